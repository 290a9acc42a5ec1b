//! Running the program, and the tiny generator, pool and classifier that many tests start from.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::OnceLock,
    time::Duration,
};

/// The program with these arguments, blank-separated; `{}` in them is not special.
pub fn proxyset(args: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_proxyset"));
    command.args(args.split_whitespace()).env_remove("PROXYSET_CPU");
    command
}

/// Runs the program, which must succeed. Returns stdout.
pub fn ok(args: &str) -> String {
    let output = proxyset(args).output().unwrap();
    assert!(output.status.success(), "{}", described(args, &output));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs the program, which must exit with `code` and print each of `parts` on stderr.
#[track_caller]
pub fn fails(args: &str, code: i32, parts: &[&str]) {
    assert_ne!(code, 0);
    ends(args, code, parts);
}

/// Runs the program, which must succeed and print each of `parts` on stderr.
#[track_caller]
pub fn succeeds(args: &str, parts: &[&str]) {
    ends(args, 0, parts);
}

#[track_caller]
fn ends(args: &str, code: i32, parts: &[&str]) {
    let output = proxyset(args).output().unwrap();
    assert_eq!(output.status.code(), Some(code), "{}", described(args, &output));
    let stderr = String::from_utf8_lossy(&output.stderr);
    for part in parts {
        assert!(stderr.contains(part), "expected '{part}' in\n{}", described(args, &output));
    }
}

fn described(args: &str, output: &Output) -> String {
    format!(
        "proxyset {args}\n{}\n--- stdout\n{}\n--- stderr\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Starts the program without output.
pub fn start(args: &str) -> Child {
    proxyset(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Runs the program with a checkpoint at every step and kills it after this time.
pub fn kill_after(args: &str, time: Duration) {
    let mut child = proxyset(args)
        .env("PROXYSET_CHECKPOINT_SECONDS", "0")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(time);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Folders that were made once for all tests, by the verbs themselves.
pub struct Made {
    dir: tempfile::TempDir,
}

impl Made {
    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }
}

/// Flags for a diffusion model that trains in seconds.
pub const TINY_UNET: &str = "--block-out-channels 8,8 --norm-num-groups 4 --attention-head-dim 4 --batch 16";

/// `split`, `generator` (untrained but for a few steps), `pool` of 96 images in 3 shards, `classifier`, `labels`.
pub fn made() -> &'static Made {
    static MADE: OnceLock<Made> = OnceLock::new();
    MADE.get_or_init(|| {
        let made = Made { dir: tempfile::tempdir().unwrap() };
        let p = |name: &str| made.path(name);
        ok(&format!("split --out {}", p("split")));
        ok(&format!("fit-generator --split {} {TINY_UNET} --steps 20 --out {}", p("split"), p("generator")));
        let pool = "--count 96 --shard-rows 32 --micro-batch 16 --steps 3";
        ok(&format!("generate --model {} {pool} --out {}", p("generator"), p("pool")));
        let train = "--objective plain --steps 20 --batch 32 --channels 8,8 --groups 4 --eval-every 10";
        ok(&format!("train --split {} {train} --out {}", p("split"), p("classifier")));
        ok(&format!("label --pool {} --classifier {} --out {}", p("pool"), p("classifier"), p("labels")));
        made
    })
}

/// Every file below `dir` with its bytes, hidden ones left out, in name order.
pub fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_path_buf()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().unwrap().to_string_lossy().starts_with('.') {
                continue;
            }
            if path.is_dir() {
                open.push(path);
            } else {
                found.push((path.strip_prefix(dir).unwrap().to_path_buf(), std::fs::read(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

/// The pool shards of a generate folder: names and bytes.
pub fn shards(dir: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let all = files(&Path::new(dir).join("pool"));
    all.into_iter().filter(|(name, _)| name.extension().is_some_and(|e| e == "parquet")).collect()
}
