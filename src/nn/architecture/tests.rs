//! What `unet/config.json` may say.

use serde_json::json;

use super::*;

fn parse(json: Value) -> Result<DenoiserConfig> {
    let Value::Object(json) = json else { panic!("the test gives an object") };
    DenoiserConfig::from_json("UNet2DModel", json).map(|(config, _)| config)
}

#[test]
fn what_is_written_is_read_back() {
    let config = DenoiserConfig::UNet(UNetConfig {
        sample_size: Some(SampleSize::Rectangle([32, 64])),
        num_class_embeds: Some(10),
        ..UNetConfig::default()
    });
    let json = config.to_json().unwrap();
    assert_eq!(json["_class_name"], "UNet2DModel");
    assert_eq!(parse(Value::Object(json)).unwrap(), config);
}

#[test]
fn options_that_are_not_built_are_refused_by_key_and_value() {
    let cases = [
        (
            json!({"time_embedding_type": "fourier"}),
            "time_embedding_type is \"fourier\", expected positional",
        ),
        (json!({"downsample_type": "resnet"}), "downsample_type is \"resnet\", expected conv"),
        (
            json!({"down_block_types": ["KDownBlock2D"]}),
            "down_block_types is \"KDownBlock2D\", expected DownBlock2D or AttnDownBlock2D",
        ),
        (json!({"class_embed_type": "timestep"}), "class_embed_type is \"timestep\", expected null"),
        (json!({"mid_block_type": null}), "mid_block_type is \"null\", expected UNetMidBlock2D"),
        (json!({"norm_num_groups": 5}), "norm_num_groups is 5, expected a divisor of all block_out_channels"),
        (json!({"sample_size": 12}), "sample_size is Square(12), expected multiples of 8"),
        (json!({"block_out_channels": []}), "block_out_channels is [], expected at least one block"),
        (json!({"up_block_types": ["UpBlock2D"]}), "expected one entry for each of the 4 block_out_channels"),
        (json!({"encoder_hid_dim": 3}), "encoder_hid_dim is 3, expected no such key in a UNet2DModel"),
        (
            json!({"encoder_hid_dim": 3, "norm_eps": 0.0, "act_fn": "gelu"}),
            "UNet2DModel; act_fn is \"gelu\", expected silu or swish; norm_eps is 0.0, expected above 0",
        ),
        (json!({"_class_name": "UNet2DConditionModel"}), "expected \"UNet2DModel\""),
    ];
    for (json, expected) in cases {
        let error = parse(json).unwrap_err();
        assert_eq!(error.exit_code(), 65);
        assert!(error.to_string().contains(expected), "{error}\ndoes not say: {expected}");
    }
}

#[test]
fn what_comes_out_of_a_denoiser_has_the_shape_of_what_goes_in() {
    let config = |json| parse(json).unwrap();
    let square = json!({"sample_size": 32, "in_channels": 1, "out_channels": 1});
    assert_eq!(config(square).image_shape().unwrap(), (32, 32, 1));
    for (json, expected) in [
        (json!({}), "the U-Net's sample_size is not set, expected the side of its images"),
        (
            json!({"sample_size": 32, "out_channels": 5}),
            "out_channels is 5, expected 3, that of in_channels, or twice as many if the variance is learned",
        ),
    ] {
        let error = config(json).image_shape().unwrap_err();
        assert_eq!((error.exit_code(), &*error.to_string()), (65, expected));
    }
}

/// train_unconditional.py of diffusers saves the averaged network so.
#[test]
fn what_a_moving_average_adds_is_ignored_and_said() {
    let json = json!({"sample_size": 32, "decay": 0.9999, "power": 0.75, "use_ema_warmup": true});
    let (config, note) = DenoiserConfig::from_json("UNet2DModel", json.as_object().unwrap().clone()).unwrap();
    assert_eq!(config, parse(json!({"sample_size": 32})).unwrap());
    assert_eq!(note.unwrap(), "decay, power, use_ema_warmup belong to a moving average: ignored");
    let learned = parse(json!({"sample_size": 32, "out_channels": 6})).unwrap();
    assert!(learned.predicts_variance() && learned.image_shape().unwrap() == (32, 32, 3));
}
