//! `convert`: checkpoints that PyTorch wrote, and files that nobody should trust.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    collections::HashMap,
    io::{Cursor, Write},
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};
use proxyset::{
    diffusion::DiffusionModel,
    nn::{Classifier, DenoiserConfig, Params, StateDict},
};
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

use crate::run::{fails, ok};

/// Counts what each thread has allocated, and the most that it ever had.
struct Counting;

thread_local! {
    static NOW: Cell<usize> = const { Cell::new(0) };
    static MOST: Cell<usize> = const { Cell::new(0) };
}

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: the system's allocator does the work; the counters allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.get().wrapping_add(layout.size());
        NOW.set(now);
        // What other threads gave back here counts below zero.
        if now < usize::MAX / 2 {
            MOST.set(MOST.get().max(now));
        }
        // SAFETY: by the contract of this function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.set(NOW.get().wrapping_sub(layout.size()));
        // SAFETY: by the contract of this function.
        unsafe { System.dealloc(at, layout) }
    }
}

/// The most bytes that this thread had allocated at once while it did `work`.
fn allocated(work: impl FnOnce()) -> usize {
    NOW.set(0);
    MOST.set(0);
    work();
    MOST.get()
}

fn checkpoints() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoints")
}

fn nhwc(t: &Tensor) -> Tensor {
    t.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

fn expected() -> HashMap<String, Tensor> {
    candle_core::safetensors::load(checkpoints().join("expected.safetensors"), &Device::Cpu).unwrap()
}

const SETTINGS: &str = "--set image_size=8 --class-names a,b,c,d,e --quiet";

#[test]
fn checkpoints_of_pytorch_in_many_forms_become_classifiers_with_its_logits() {
    let (dir, expected) = (tempfile::tempdir().unwrap(), expected());
    let x = nhwc(&expected["x"]);
    let mut forms = 0;
    for (form, logits) in &expected {
        let source = checkpoints().join(format!("{form}.pt"));
        if !source.is_file() {
            assert!(["x", "unet"].contains(&form.as_str()), "{form}");
            continue;
        }
        let out = dir.path().join(form);
        ok(&format!("convert {} --out {} {SETTINGS}", source.display(), out.display()));
        let classifier = Classifier::load(&out, &Device::Cpu).unwrap();
        let config = serde_json::to_value(classifier.config()).unwrap();
        assert_eq!(
            (&config["arch"], &config["widths"][1], &config["blocks"][0]),
            (&"resnet".into(), &6.into(), &1.into())
        );
        let standardized = form.starts_with("normalized");
        assert_eq!(config["standardize"]["std"][2] == 0.125, standardized, "{form}: {config}");
        let difference = largest_difference(&classifier.logits(&x).unwrap(), logits);
        assert!(difference <= 1e-5, "{form}: logits differ by {difference}");
        forms += 1;
    }
    assert_eq!(forms, 16);
}

#[test]
fn weights_of_a_denoiser_need_their_configuration_and_their_noise() {
    let (dir, expected) = (tempfile::tempdir().unwrap(), expected());
    let (source, out) = (checkpoints().join("unet").display().to_string(), dir.path().join("out"));
    let convert =
        |source: &str, more: &str| format!("convert {source} --out {} --quiet {more}", out.display());
    fails(&convert(&source, ""), 2, &["scheduler is not set", "ddpm-linear-1000"]);
    fails(
        &convert(&format!("{source}/diffusion_pytorch_model.bin"), ""),
        2,
        &["do not say its sample_size, block_out"],
    );
    fails(
        &convert(&source, "--scheduler ddpm-linear-1000 --set in_channels=3"),
        65,
        &["in_channels is stated as 3", "say 1"],
    );
    assert!(!out.exists());
    ok(&convert(&source, "--scheduler ddpm-linear-1000"));
    let model = DiffusionModel::load(&out, None, &Device::Cpu).unwrap();
    let x = nhwc(&expected["x"].narrow(1, 0, 1).unwrap());
    let difference = largest_difference(&model.predict(&x, 17.0, None).unwrap(), &nhwc(&expected["unet"]));
    assert!(difference <= 1e-5, "{difference}");
    // A model folder is a source too, with the names of its classes.
    std::fs::write(out.join("proxyset.json"), "{}").unwrap();
    let again = dir.path().join("again");
    ok(&format!("convert {} --out {} --quiet", out.display(), again.display()));
    assert_eq!(crate::run::files(&out), crate::run::files(&again));
    let third = dir.path().join("third");
    fails(
        &format!("convert {} --out {} --key ema", out.display(), third.display()),
        2,
        &["is a model folder"],
    );
}

/// As a checkpoint of EDM that docs/convert.md exports.
#[test]
fn a_song_unet_shows_its_configuration_and_is_sampled_from_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let config = serde_json::json!({
        "img_resolution": 8, "in_channels": 1, "out_channels": 1, "label_dim": 3, "augment_dim": 2,
        "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4],
    });
    let config = DenoiserConfig::from_json("SongUNet", config.as_object().unwrap().clone()).unwrap().0;
    let params = Params::init(1, &Device::Cpu, |b| config.build(b)).unwrap();
    let tensors = candle_core::safetensors::load_buffer(&params.to_safetensors(&[]).unwrap(), &Device::Cpu);
    let wrapped: HashMap<_, _> =
        tensors.unwrap().into_iter().map(|(name, tensor)| (format!("model.{name}"), tensor)).collect();
    candle_core::safetensors::save(&wrapped, path("edm.safetensors")).unwrap();
    let convert = |more: &str| {
        format!(
            "convert {} --out {} --quiet {more}",
            path("edm.safetensors").display(),
            path("model").display()
        )
    };
    fails(&convert(""), 2, &["scheduler is not set", "edm or a scheduler_config.json"]);
    let stated = "--scheduler edm --set model_channels=16";
    fails(&convert(stated), 65, &["model_channels is stated as 16, but the weights say 8"]);
    ok(&convert("--scheduler edm --set channel_mult=[1.0,2.0]"));

    let index = std::fs::read_to_string(path("model/model_index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    assert_eq!(index["unet"], serde_json::json!(["proxyset", "SongUNet"]));
    let model = DiffusionModel::load(&path("model"), None, &Device::Cpu).unwrap();
    let x = Tensor::arange(0f32, 128.0, &Device::Cpu).unwrap();
    let x = (x.reshape((2, 8, 8, 1)).unwrap() / 64.0).unwrap();
    let (t, classes) =
        (Tensor::full(-0.5f32, 2, &Device::Cpu).unwrap(), Tensor::new(&[2u32, 0], &Device::Cpu).unwrap());
    let net = params.frozen(|b| config.build(b)).unwrap();
    let difference = largest_difference(
        &model.predict(&x, -0.5, Some(&classes)).unwrap(),
        &net.forward(&x, &t, Some(&classes)).unwrap(),
    );
    assert!(difference == 0.0, "{difference}");
    ok(&format!(
        "generate --model {} --out {} --count 6 --shard-rows 6 --micro-batch 6 --steps 1 --quiet",
        path("model").display(),
        path("pool").display()
    ));
    assert!(path("pool/pool/shard-00000.parquet").is_file());
}

#[test]
fn what_is_not_said_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out").display().to_string();
    let zip = checkpoints().join("zip.pt").display().to_string();
    fails(&format!("convert {zip} --out {out} --class-names a"), 2, &["do not say its image_size"]);
    fails(&format!("convert {zip} --out {out} --set image_size=8"), 2, &["class_names is not set"]);
    fails(
        &format!("convert {zip} --out {out} --network vit"),
        65,
        &["the network is vit, expected one of small_cnn"],
    );
    let wrong = "is not part of this network";
    fails(
        &format!(
            "convert {zip} --out {out} {SETTINGS} --network small_cnn --set channels=[8] --set groups=2 --set in_channels=3 --set num_classes=5"
        ),
        65,
        &[wrong, "bn1.running_var"],
    );
    fails(
        &format!("convert {zip} --out {out} {SETTINGS} --key ema"),
        65,
        &["has no state dict ema; it has itself (38 tensors)"],
    );
    fails(
        &format!("convert {zip} --out {} {SETTINGS}", dir.path().parent().unwrap().display()),
        2,
        &["is not empty"],
    );
    let several = archive(
        &pickle(&dict(&[
            ("model", dict(&[("w", tensor(0, "4", "1", 4))])),
            ("ema", dict(&[("w", tensor(0, "4", "1", 4))])),
        ])),
        4,
    );
    let path = dir.path().join("several.pt");
    std::fs::write(&path, several).unwrap();
    fails(
        &format!("convert {} --out {out}", path.display()),
        65,
        &["several state dicts", "model (1 tensors), ema (1 tensors)"],
    );
    fails(
        &format!("convert {} --key ema --out {out}", path.display()),
        65,
        &["the 1 tensors are of no network", "begin with w"],
    );
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "something was written");
}

fn pickle(body: &[u8]) -> Vec<u8> {
    [b"\x80\x02", body, b"."].concat()
}

fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn int(value: i32) -> Vec<u8> {
    [b"J", &value.to_le_bytes()[..]].concat()
}

fn global(module: &str, name: &str) -> Vec<u8> {
    format!("c{module}\n{name}\n").into_bytes()
}

fn dict(items: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let items = items.iter().flat_map(|(key, value)| [text(key), value.clone()]);
    [b"}(".to_vec(), items.flatten().collect(), b"u".to_vec()].concat()
}

fn tuple(numbers: &str) -> Vec<u8> {
    let numbers = numbers.split(',').flat_map(|number| int(number.parse().unwrap()));
    [b"(".to_vec(), numbers.collect(), b"t".to_vec()].concat()
}

/// A tensor in storage 0, of `len` floats.
fn tensor(offset: i32, shape: &str, strides: &str, len: i32) -> Vec<u8> {
    let storage =
        [text("storage"), global("torch", "FloatStorage"), text("0"), text("cpu"), int(len)].concat();
    [
        global("torch._utils", "_rebuild_tensor_v2"),
        [b"((", &storage[..], b"tQ"].concat(),
        int(offset),
        tuple(shape),
        tuple(strides),
        b"\x89}tR".to_vec(),
    ]
    .concat()
}

/// A file of `torch.save` with this pickle and one storage of `len` floats.
fn archive(pickle: &[u8], len: usize) -> Vec<u8> {
    compressed(pickle, len, CompressionMethod::Stored)
}

fn compressed(pickle: &[u8], len: usize, method: CompressionMethod) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in [("archive/data.pkl", pickle), ("archive/data/0", &vec![0; 4 * len])] {
        zip.start_file(name, SimpleFileOptions::default().compression_method(method)).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

#[test]
fn hostile_files_run_nothing_take_little_memory_and_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let marker = dir.path().join("marker");
    let w = |tensor: Vec<u8>| archive(&pickle(&dict(&[("w", tensor)])), 4);
    let system =
        [global("posix", "system"), text(&format!("touch {}", marker.display())), b"\x85R".to_vec()].concat();
    let eval = [text("builtins"), text("eval"), b"\x93".to_vec(), text("1"), b"\x85R".to_vec()].concat();
    let valid = w(tensor(0, "2,2", "2,1", 4));
    let million = |byte: &[u8], start: &[u8]| pickle(&[start, &byte.repeat(8 << 20)].concat());
    // Each list holds the one before it twice.
    let laughs: Vec<u8> =
        (0..60u8).flat_map(|i| [b"](h".to_vec(), vec![i, b'h', i, b'e', b'q', i + 1]].concat()).collect();
    let hostile: Vec<(&str, Vec<u8>, &str)> = vec![
        (
            "system",
            w(system),
            "asks for posix.system, Python code that is no part of a state dict; nothing of it was run",
        ),
        ("eval", pickle(&eval), "asks for builtins.eval"),
        ("os-in-legacy", pickle(&global("os", "popen")), "asks for os.popen"),
        (
            "edm",
            b"\x80\x03}(X\x03\x00\x00\x00emactorch_utils.persistence\n_reconstruct_persistent_obj\n".to_vec(),
            "docs/convert.md has a script",
        ),
        (
            "nested-pickle",
            w(global("torch.storage", "_load_from_bytes")),
            "asks for torch.storage._load_from_bytes",
        ),
        (
            "call-of-text",
            w([text("os"), b")R".to_vec()].concat()),
            "calls a plain value, expected a function or class",
        ),
        ("text-of-4-gib", w([b"X\xff\xff\xff\xff".to_vec(), text("a")].concat()), "ends within an operation"),
        (
            "huge-tensor",
            w(tensor(0, "2000000000,2000000000,2000000000", "1,1,1", 4)),
            "not a part of the 4 numbers",
        ),
        (
            "huge-storage",
            w(tensor(0, "2000000000", "1", 2_000_000_000)),
            "has 16 bytes, which are not those of 2000000000 F32",
        ),
        (
            "bomb",
            compressed(&million(b"N", b""), 1 << 26, CompressionMethod::Deflated),
            "is compressed or encrypted",
        ),
        ("deep", archive(&million(b"\x85", b"]"), 4), "takes more than 40 MiB"),
        ("marks", archive(&million(b"(", b""), 4), "takes more than 40 MiB"),
        ("values", archive(&million(b"N", b""), 4), "takes more than 40 MiB"),
        ("containers", archive(&million(b"]", b""), 4), "takes more than 40 MiB"),
        ("memo", archive(&million(b"\x94", b"N"), 4), "takes more than 40 MiB"),
        ("items", archive(&million(b"Na", b"]"), 4), "takes more than 40 MiB"),
        ("memo-loop", archive(&pickle(b"}q\x00X\x01\x00\x00\x00ah\x00s"), 4), "expected a dict of tensors"),
        ("laughs", archive(&pickle(&[b"]q\x00", &laughs[..]].concat()), 4), "expected a dict of tensors"),
        (
            "truncated-pickle",
            archive(&pickle(&dict(&[("w", tensor(0, "4", "1", 4))]))[..90], 4),
            "the pickle ends",
        ),
        ("truncated-archive", valid[..valid.len() / 2].to_vec(), "zip archive"),
        ("beyond-the-storage", w(tensor(1, "4", "1", 4)), "not a part of the 4 numbers of its storage"),
        ("overlapping", w(tensor(0, "1000,1000,1000", "0,0,0", 4)), "with strides [0, 0, 0]"),
        ("negative", w(tensor(3, "4", "-1", 4)), "is -1, expected no negative number"),
        ("unknown-operation", archive(&pickle(b"(ios\nsystem\n"), 4), "has the operation 0x69"),
        ("persistent", w([text("module"), b"\x85Q".to_vec()].concat()), "expected a dict of tensors"),
        (
            "other-storage",
            w([
                global("torch._utils", "_rebuild_tensor_v2"),
                b"(".to_vec(),
                text("module"),
                b"\x85QK\x00))t".to_vec(),
                b"R".to_vec(),
            ]
            .concat()),
            "refers to module outside of itself",
        ),
        (
            "no-storage",
            w([global("torch._utils", "_rebuild_tensor_v2"), b")R".to_vec()].concat()),
            "is made of 0 values",
        ),
        (
            "shared-storage",
            archive(
                &pickle(&dict(
                    &["a", "b", "c", "d", "e", "f", "g", "h"]
                        .map(|name| (name, tensor(0, "4096", "1", 4096))),
                )),
                4096,
            ),
            "more than twice those of the file",
        ),
        (
            "memory-of-the-stack",
            archive(&pickle(b"0"), 4),
            "takes a value from its stack where there is none",
        ),
        ("no-mark", archive(&pickle(b"t"), 4), "goes back to a mark that it has not set"),
    ];
    for (name, bytes, said) in &hostile {
        let path = dir.path().join(format!("{name}.pt"));
        std::fs::write(&path, bytes).unwrap();
        let most = allocated(|| {
            let error = StateDict::open(&path).err().unwrap_or_else(|| panic!("{name} is opened"));
            assert!(error.to_string().contains(said), "{name}: {error}");
        });
        let beyond = most.saturating_sub(bytes.len());
        assert!(beyond < 64 << 20, "{name}: {beyond} bytes more than the file");
        let out = dir.path().join("out");
        fails(&format!("convert {} --out {} {SETTINGS}", path.display(), out.display()), 65, &[said]);
        std::fs::remove_file(&path).unwrap();
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "something was run or written");
}

#[test]
fn damaged_files_are_read_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("damaged.pt");
    let (mut read, mut refused) = (0, 0);
    for form in ["zip.pt", "legacy.pt", "protocol-4.pt"] {
        let whole = std::fs::read(checkpoints().join(form)).unwrap();
        for at in (0..whole.len()).step_by(37) {
            let mut bytes = whole.clone();
            bytes[at] = !bytes[at];
            if at % 5 == 0 {
                bytes.truncate(at);
            }
            std::fs::write(&path, &bytes).unwrap();
            match StateDict::open(&path) {
                Ok(mut weights) => {
                    let names: Vec<String> = weights.names().map(str::to_owned).collect();
                    names.iter().for_each(|name| drop((weights.values(name), weights.integer(name))));
                    read += 1;
                }
                Err(error) => {
                    assert_eq!(error.exit_code(), 65, "{form}, byte {at}: {error}");
                    refused += 1;
                }
            }
        }
    }
    assert!(read > 100 && refused > 200, "{read} read, {refused} refused");
}
