//! Impossible input: the exit code, a message with the value and what was expected, and nothing written.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use arrow_array::{ArrayRef, BinaryArray, Int64Array, RecordBatch, StringArray, StructArray};
use arrow_schema::{DataType, Field};
use parquet::arrow::ArrowWriter;
use proxyset::data::{Shape, encode_png};

use crate::run::{TINY_UNET, fails, files, made, ok, proxyset};

/// An output folder that must not be created.
struct Nothing {
    dir: tempfile::TempDir,
}

impl Nothing {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn out(&self) -> String {
        self.dir.path().join("out").display().to_string()
    }

    #[track_caller]
    fn fails(&self, args: &str, code: i32, parts: &[&str]) {
        fails(&format!("{args} --out {}", self.out()), code, parts);
        assert_eq!(std::fs::read_dir(self.dir.path()).unwrap().count(), 0, "something was written");
    }
}

#[test]
fn settings_that_cannot_be_are_usage_errors_that_name_value_and_range() {
    let (nothing, split, generator) = (Nothing::new(), made().path("split"), made().path("generator"));
    let cases = [
        ("generate --model MODEL --count 0", "count is 0, expected 1 to"),
        (
            "generate --model MODEL --shard-rows 100 --micro-batch 64",
            "shard_rows is 100, expected a multiple of",
        ),
        ("generate --model MODEL --count 100 --shards 0..2", "expected at most 0..1"),
        ("generate --model MODEL --count 100 --shards 3..2", "expected A..B"),
        ("generate --model MODEL --workers 0", "workers is '0', expected auto or a number from 1"),
        ("generate --model MODEL --steps 2000", "the sampler's steps are 2000, expected from 1 to 1000"),
        ("generate --count 100", "model is not set, expected"),
        ("train --split SPLIT --epsilon=-0.1", "epsilon is -0.1, expected a number from 0 to 1"),
        ("train --split SPLIT --epsilon 8", "epsilon is 8, expected a number from 0 to 1"),
        ("train --split SPLIT --gamma 1.5", "gamma is 1.5, expected 0 to 1"),
        ("train --split SPLIT --stpes 5", "--stpes"),
        ("train --split SPLIT --architecture wide-resnet --depth 12", "depth is 12, expected 10, 16"),
        (
            "train --split SPLIT --architecture resnet --channels 8,8 --blocks 1",
            "blocks is [1], expected a number",
        ),
        (
            "train --split SPLIT --standardize true",
            "--standardize has no effect with --architecture small-cnn; it belongs to resnet, wide-resnet",
        ),
        (
            "train --split SPLIT --objective plain --epsilon 0.1",
            "--epsilon has no effect with --objective plain; it belongs to pgd-at, fgsm-rs, trades",
        ),
        ("train --split SPLIT --cutmix 2", "cutmix is 2, expected 0 to 1"),
        (
            "train --split SPLIT --crop-pad 2 --crop-area 0.5",
            "crop_pad is 2 and crop_area 0.5, expected one of them",
        ),
        (
            "train --split SPLIT --architecture resnet --block preactivation --stem imagenet",
            "stem is imagenet, expected cifar with preactivation",
        ),
        (
            "train --split SPLIT --objective smooth-adv --noise-samples 0",
            "noise_samples is 0, expected 1 to 1024",
        ),
        ("train --split SPLIT --attack-batch-norm train", "attack_batch_norm is train, expected eval"),
        ("generate --model MODEL --sampler ddpm --eta 1", "--eta has no effect with --sampler ddpm"),
        ("evaluate --model MODEL --attack square --attack-steps 5", "--attack-steps has no effect"),
        ("evaluate --model MODEL --attack none --save-adversarial true", "save_adversarial is true without"),
        ("certify --model MODEL --mode predict --n0 5", "--n0 has no effect with --mode predict"),
        (
            "fit-discriminator --split SPLIT --pool SPLIT --architecture resnet",
            "architecture has batch norm, which tells a network what else is in the batch",
        ),
        (
            "train --split SPLIT --data-weights 1,2",
            "data_weights is [1.0, 2.0], expected a number above 0 for each of 0",
        ),
        ("train --split SPLIT --real-images 9999", "real_images is 9999, expected 2 to 1"),
        ("train --split SPLIT --label-smoothing 1.5", "label_smoothing is 1.5, expected 0 to"),
        ("evaluate --attack autoatack", "autoatack"),
        ("certify --model MODEL --alpha 0.7", "alpha is 0.7, expected"),
        ("certify --model MODEL --n 9", "n is 9 and alpha 0.001, with which nothing can be certified"),
        ("certify --model MODEL --mode predict --n 10", "expected n from 11"),
        ("split --limit 50 --first 20", "limit is 50 and first 20, expected one of them"),
        ("evaluate --model MODEL --first 0", "first is 0, expected 1 to"),
        (
            "train --split SPLIT --fgsm-step-ratio 1",
            "--fgsm-step-ratio has no effect with --objective pgd-at",
        ),
        ("fit-discriminator --split SPLIT --epsilons 0,0.1", "expected at least four ascending radii"),
        ("curate --keep-fraction 1.5", "keep_fraction is 1.5, expected"),
        ("split --source /nowhere/at/all", "/nowhere/at/all"),
        ("split --proxy-fraction 2", "proxy_fraction is 2, expected 0.01 to 0.9"),
        ("split --device gpu", "device is 'gpu', expected auto, cpu or cuda:N"),
        ("score --split SPLIT --pool SPLIT", "a folder of split; expected one of generate"),
    ];
    for (args, said) in cases {
        nothing.fails(&args.replace("SPLIT", &split).replace("MODEL", &generator), 2, &[said]);
    }
}

#[test]
fn pipeline_files_that_cannot_be_are_usage_errors() {
    let nothing = Nothing::new();
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        ("name = 'x'\n[generate]\ncuont = 5", "cuont"),
        ("name = 'x'\n[genrate]\ncount = 5", "unknown key 'genrate'"),
        (
            "name = 'x'\n[train]\nobjective.attack.epsilon = -0.1",
            "[train.objective.attack] epsilon: epsilon is -0.1, expected a number from 0 to 1",
        ),
        ("name = 'x'\n[labeller.objective]\nattack.steps = 3", "attack has no effect with kind = \"plain\""),
        ("name = 'x'\n[generate]\ncount = 0", "count is 0, expected 1 to"),
        ("name = 'x'\n[generate]\nshards = '0..1'", "proxyset generate --shards"),
        ("name = 'x'\n[publish]", "to is not set"),
        ("name = 'x'\n[evaluate]", "there is no classifier to evaluate"),
        ("name = 'x'\n[train]\n\"optimizer.momentum\" = 0.5", "[train] \"optimizer.momentum\" is not known"),
        ("name = 'x'\n[train.optimizer]\n\"a/b\" = 0.5", "[train.optimizer] \"a/b\" is not known"),
        ("name = 'x'\nlabeller = 3", "expected a table [labeller]"),
        ("name = 'x'\n[split]\nsource = true", "expected a text or a number"),
        ("name = 'x'\n[split]\nsource = 1.10", "found the number 1.1, expected a text"),
        ("name = 'x'\n[split", "p.toml"),
    ];
    for (text, said) in cases {
        let file = dir.path().join("p.toml");
        std::fs::write(&file, text).unwrap();
        for verb in ["plan", "run"] {
            nothing.fails(&format!("{verb} {}", file.display()), 2, &[said]);
        }
    }
    for (text, said) in OLD_KEYS {
        let file = dir.path().join("p.toml");
        std::fs::write(&file, format!("name = 'x'\n{text}")).unwrap();
        nothing.fails(&format!("plan {}", file.display()), 2, &[said]);
    }
    nothing.fails("run /nowhere/p.toml", 2, &["/nowhere/p.toml"]);
}

/// Keys from before there were groups, and what the program says about them.
const OLD_KEYS: [(&str, &str); 22] = [
    ("[train]\nlearning_rate = 0.1", "[train] learning_rate is now [train.optimizer] learning_rate"),
    ("[train]\ngrad_clip = 1", "[train] grad_clip is now [train.optimizer] grad_clip"),
    ("[train]\nwarmup_steps = 1", "[train] warmup_steps is now [train.schedule] warmup_steps"),
    (
        "[train]\nschedule = 'one-cycle'",
        "[train] schedule is now a table: [train.schedule] kind = \"one-cycle\"",
    ),
    (
        "[train]\nobjective = 'trades'",
        "[train] objective is now a table: [train.objective] kind = \"trades\"",
    ),
    (
        "[train]\nattack_steps = 3",
        "[train] attack_steps is now [train.objective.attack] steps, of kind pgd-at or",
    ),
    ("[train]\nepsilon = 0.1", "[train] epsilon is now [train.objective.attack] epsilon"),
    ("[train]\nbeta = 3", "[train] beta is now [train.objective] beta, of kind trades or stability"),
    ("[train]\ndepth = 34", "[train] depth is now [train.architecture] depth, of kind wide-resnet"),
    ("[train]\nflip = true", "[train] flip is now [train.augmentation] flip"),
    ("[labeller]\nchannels = [8]", "[labeller] channels is now [labeller.architecture] channels"),
    (
        "[evaluate]\nrestarts = 3\n[train]",
        "[evaluate] restarts is now [evaluate.attack] restarts, of kind pgd",
    ),
    ("[evaluate]\nattack_loss = 'cw'\n[train]", "[evaluate] attack_loss is now [evaluate.attack] loss"),
    (
        "[evaluate]\nattack = 'none'\n[train]",
        "[evaluate] attack is now a table: [evaluate.attack] kind = \"none\"",
    ),
    ("[arc]\nattack_step_ratio = 2", "[arc] attack_step_ratio is now [arc.attack] step_ratio"),
    (
        "[fit-discriminator]\nepsilons = [0]",
        "[fit-discriminator] epsilons is now [fit-discriminator.attack] epsilons",
    ),
    ("[fit-generator]\ndropout = 0.1", "[fit-generator] dropout is now [fit-generator.architecture] dropout"),
    ("[fit-generator]\ncosine = true", "[fit-generator] cosine is now [fit-generator.schedule] kind"),
    (
        "[fit-generator]\nprediction = 'edm'",
        "[fit-generator] prediction is now [fit-generator.process] prediction",
    ),
    ("[generate]\nsampler = 'ddim'", "[generate] sampler is now a table: [generate.sampler] kind = \"ddim\""),
    ("[generate]\nsteps = 5", "[generate] steps is now [generate.sampler] steps"),
    ("[certify]\nn0 = 5\n[train]", "[certify] n0 is now [certify.mode] n0, of kind certify"),
];

#[test]
fn an_unknown_cpu_level_or_convolution_is_a_usage_error() {
    for (variable, value, said) in [
        ("PROXYSET_CPU", "mmx", "PROXYSET_CPU is 'mmx', expected portable, avx2 or avx512"),
        ("PROXYSET_CONV", "fft", "PROXYSET_CONV is 'fft', expected winograd or direct"),
    ] {
        let output = crate::run::proxyset("plan x").env(variable, value).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains(said));
    }
}

/// A source of 60 grey 8x8 images of two classes, three columns of which the caller may spoil.
fn source(
    dir: &Path,
    label_name: &str,
    labels: Vec<i64>,
    spoil: impl Fn(usize, Vec<u8>) -> Vec<u8>,
) -> PathBuf {
    let shape = Shape { height: 8, width: 8, channels: 1 };
    let images: Vec<Vec<u8>> =
        (0..labels.len()).map(|i| spoil(i, encode_png(&[(i * 4) as u8; 64], shape))).collect();
    let bytes: ArrayRef = Arc::new(BinaryArray::from_iter_values(&images));
    let paths: ArrayRef = Arc::new(StringArray::new_null(labels.len()));
    let image: ArrayRef = Arc::new(StructArray::from(vec![
        (Arc::new(Field::new("bytes", DataType::Binary, true)), bytes),
        (Arc::new(Field::new("path", DataType::Utf8, true)), paths),
    ]));
    let label: ArrayRef = Arc::new(Int64Array::from(labels));
    let batch = RecordBatch::try_from_iter([("image", image), (label_name, label)]).unwrap();
    let names = r#"{"info":{"features":{"image":{"_type":"Image"},"label":{"names":["a","b"],"_type":"ClassLabel"}}}}"#;
    let metadata = [("huggingface".to_owned(), names.to_owned())].into();
    let schema = Arc::new(batch.schema().as_ref().clone().with_metadata(metadata));
    let batch = batch.with_schema(schema.clone()).unwrap();
    let path = dir.join("train-00000-of-00001.parquet");
    let mut writer = ArrowWriter::try_new(std::fs::File::create(&path).unwrap(), schema, None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    path
}

fn two_classes(n: usize) -> Vec<i64> {
    (0..n).map(|i| i as i64 % 2).collect()
}

#[test]
fn bad_data_is_65_with_file_row_and_value() {
    let nothing = Nothing::new();
    let split = |path: &Path| format!("split --source {}", path.display());

    let dir = tempfile::tempdir().unwrap();
    let path = source(dir.path(), "lable", two_classes(60), |_, png| png);
    nothing.fails(&split(&path), 65, &["no column 'label', found image, lable"]);

    let mut labels = two_classes(60);
    labels[7] = 2;
    let path = source(dir.path(), "label", labels, |_, png| png);
    nothing.fails(&split(&path), 65, &["row 7", "2", "max_bad"]);

    let path = source(dir.path(), "label", two_classes(60), |_, png| png);
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 100]).unwrap();
    nothing.fails(
        &split(&path),
        65,
        &["train-00000-of-00001.parquet", "not a Parquet file, or a damaged one"],
    );

    let spoil = |i: usize, mut png: Vec<u8>| {
        if i == 11 {
            png.truncate(40);
        }
        png
    };
    let path = source(dir.path(), "label", two_classes(60), spoil);
    nothing.fails(&split(&path), 65, &["row 11", "PNG"]);
    let out = nothing.out();
    let summary = ok(&format!("{} --max-bad 1 --out {out} --json", split(&path)));
    let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
    assert_eq!((&summary["summary"]["images"], &summary["summary"]["bad_rows"]), (&59.into(), &1.into()));
}

#[test]
fn models_that_do_not_fit_are_65() {
    let nothing = Nothing::new();
    let dir = tempfile::tempdir().unwrap();
    let copy = |name: &str| {
        let to = dir.path().join(name);
        for (file, bytes) in files(Path::new(&made().path(name))) {
            let path = to.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        std::fs::remove_file(to.join("config.toml")).unwrap();
        to
    };
    let classifier = copy("classifier");
    let config = classifier.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("\"image_size\": 8", "\"image_size\": 16")).unwrap();
    let (pool, classifier) = (made().path("pool"), classifier.display().to_string());
    nothing.fails(
        &format!("label --pool {pool} --classifier {classifier}"),
        65,
        &["(16, 16, 1)", "8x8 grey"],
    );
    nothing.fails(&format!("evaluate --model {classifier}"), 65, &["(16, 16, 1)", "8x8 grey"]);

    let model = copy("generator");
    let weights = model.join("unet/diffusion_pytorch_model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &whole[..whole.len() - 1]).unwrap();
    let generate =
        format!("generate --model {} --count 16 --micro-batch 16 --shard-rows 16 --steps 2", model.display());
    nothing.fails(&generate, 65, &["diffusion_pytorch_model.safetensors"]);
    let config = model.join("unet/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("\"downsample_type\": \"conv\"", "\"downsample_type\": \"resnet\""))
        .unwrap();
    nothing.fails(&generate, 65, &["downsample_type", "resnet"]);
}

#[test]
fn folders_of_another_run_foreign_folders_and_unfinished_inputs_are_refused_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("split");
    ok(&format!("split --seed 1 --out {}", out.display()));
    let before = files(&out);
    fails(
        &format!("split --seed 2 --out {}", out.display()),
        2,
        &["holds another run", "choose another folder"],
    );
    assert!(files(&out) == before);

    let foreign = dir.path().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("thesis.tex"), "x").unwrap();
    fails(&format!("split --out {}", foreign.display()), 2, &["not a run of this program"]);
    assert_eq!(files(&foreign).len(), 1);

    std::fs::remove_file(out.join("done.json")).unwrap();
    let nothing = Nothing::new();
    nothing.fails(&format!("fit-generator --split {} {TINY_UNET}", out.display()), 2, &["not finished"]);
}

#[test]
fn a_damaged_fingerprint_is_shown_and_no_panic() {
    let dir = tempfile::tempdir().unwrap();
    ok(&format!("split --out {}", dir.path().join("split").display()));
    let config = dir.path().join("split/config.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    for damaged in ["", "ä", "0123ö"] {
        let line = text.lines().find(|line| line.starts_with("fingerprint")).unwrap();
        std::fs::write(&config, text.replace(line, &format!("fingerprint = \"{damaged}\""))).unwrap();
        ok(&format!("status {}", dir.path().display()));
        fails(&format!("split --out {}", dir.path().join("split").display()), 2, &["holds another run"]);
    }
}

#[test]
fn an_evaluation_without_out_reads_and_leaves_nothing_in_the_shared_temporary_folder() {
    let dir = tempfile::tempdir().unwrap();
    let evaluate = format!("evaluate --model {} --attack none --limit 20 --quiet", made().path("classifier"));
    let output = proxyset(&evaluate).env("TMPDIR", dir.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn arguments_and_environment_that_cannot_be_are_usage_errors() {
    use std::os::unix::ffi::OsStrExt;
    let nothing = Nothing::new();
    let path = std::ffi::OsStr::from_bytes(b"/tmp/\xff");
    let output = proxyset("split --out").arg(path).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("expected text in UTF-8"));
    for wrong in ["soon", "-1", "1.5", ""] {
        let split = format!("split --out {}", nothing.out());
        let output = proxyset(&split).env("PROXYSET_CHECKPOINT_SECONDS", wrong).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong}");
        let expected =
            format!("PROXYSET_CHECKPOINT_SECONDS is '{wrong}', expected a whole number of seconds");
        assert!(String::from_utf8_lossy(&output.stderr).contains(&expected), "{wrong}");
    }
    assert!(!Path::new(&nothing.out()).exists());
}

#[test]
fn a_locked_folder_is_75() {
    let dir = tempfile::tempdir().unwrap();
    let lock = std::fs::File::create(dir.path().join(".run.lock")).unwrap();
    lock.try_lock().unwrap();
    fails(&format!("split --out {}", dir.path().display()), 75, &["another process is at work here"]);
    drop(lock);
    ok(&format!("split --out {}", dir.path().display()));
}

#[test]
fn a_models_faults_are_all_named_at_once_and_nothing_is_made() {
    let (nothing, dir) = (Nothing::new(), tempfile::tempdir().unwrap());
    let model = dir.path().join("model");
    let edit = |name: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let path = model.join(name);
        let mut json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        std::fs::write(&path, json.to_string()).unwrap();
    };
    let refused =
        |said: &[&str]| nothing.fails(&format!("generate --model {} --count 4", model.display()), 65, said);
    for (name, bytes) in files(Path::new(&made().path("generator"))) {
        std::fs::create_dir_all(model.join(&name).parent().unwrap()).unwrap();
        std::fs::write(model.join(&name), bytes).unwrap();
    }

    let weights = model.join("unet/diffusion_pytorch_model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    let mut tensors = candle_core::safetensors::load_buffer(&whole, &candle_core::Device::Cpu).unwrap();
    let bias = tensors.remove("conv_in.bias").unwrap();
    tensors.insert("conv_in.extra".into(), bias.clone());
    tensors.insert("conv_out.bias".into(), (&bias * f64::NAN).unwrap().narrow(0, 0, 1).unwrap());
    let misshapen = tensors["conv_norm_out.weight"].narrow(0, 0, 3).unwrap().contiguous().unwrap();
    tensors.insert("conv_norm_out.weight".into(), misshapen);
    candle_core::safetensors::save(&tensors, &weights).unwrap();
    edit("scheduler/scheduler_config.json", &|json| {
        json["thresholding"] = true.into();
        json["beta_schedule"] = "laplace".into();
    });
    refused(&[
        "conv_in.bias is missing",
        "conv_in.extra is not part of this network",
        "conv_out.bias holds NaN",
        "conv_norm_out.weight has shape [3], expected [8]",
        "thresholding is true, expected false",
        "found 'laplace', expected linear",
    ]);

    std::fs::write(&weights, &whole[..whole.len() - 5]).unwrap();
    edit("unet/config.json", &|json| {
        json["upsample_type"] = "resnet".into();
        json["encoder_hid_dim"] = 4.into();
    });
    refused(&[
        "upsample_type is \"resnet\", expected conv",
        "encoder_hid_dim is 4, expected no such key",
        "thresholding is true, expected false",
    ]);
    edit("unet/config.json", &|json| {
        json["upsample_type"] = "conv".into();
        json.as_object_mut().unwrap().remove("encoder_hid_dim");
    });
    refused(&["not a safetensors file", "thresholding is true"]);
    std::fs::write(&weights, "version https://git-lfs.example/spec/v1\noid sha256:00\nsize 3\n").unwrap();
    refused(&["a pointer of Git LFS, not the file that it stands for"]);
}

/// A small file system of its own, unmounted at the end.
struct Mount {
    dir: tempfile::TempDir,
}

impl Mount {
    /// `None` if this process may not mount, which the test then reports.
    fn new(options: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(dir.path()).output();
        if mount.is_ok_and(|m| m.status.success()) {
            return Some(Self { dir });
        }
        eprintln!("skipped: this process may not mount a tmpfs");
        None
    }

    fn remount(&self, options: &str) {
        let status = Command::new("mount").args(["-o", options]).arg(self.dir.path()).status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.dir.path()).status();
    }
}

#[test]
fn a_full_disk_is_74_leaves_nothing_half_written_and_the_work_goes_on() {
    let Some(mount) = Mount::new("size=128k") else { return };
    let out = mount.dir.path().join("pool").display().to_string();
    let verb = format!(
        "generate --model {} --count 256 --shard-rows 64 --micro-batch 64 --steps 2 --out {out}",
        made().path("generator")
    );
    let filler = mount.dir.path().join("filler");
    std::fs::write(&filler, vec![0; 100 << 10]).unwrap();
    fails(&verb, 74, &["No space left on device"]);
    for (name, bytes) in files(Path::new(&out)) {
        assert!(
            name.extension().is_some_and(|e| e == "json" || e == "toml" || e == "parquet"),
            "{}",
            name.display()
        );
        assert!(!bytes.is_empty());
    }
    std::fs::remove_file(&filler).unwrap();
    mount.remount("remount,size=8m");
    ok(&verb);
    ok(&format!("check {out}"));
}

#[test]
fn a_read_only_disk_is_74() {
    let Some(mount) = Mount::new("size=1m,ro") else { return };
    let out = mount.dir.path().join("split");
    fails(&format!("split --out {}", out.display()), 74, &["Read-only file system"]);
    assert_eq!(std::fs::read_dir(mount.dir.path()).unwrap().count(), 0);
}
