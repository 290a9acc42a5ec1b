//! Our side of `make bench-peers` and `make bench-cuda`: a server that `tests/bench/peers.py` drives, so that it can run PyTorch and
//! proxyset in turn.
//!
//! One JSON command per line on stdin, one JSON answer per line on stdout, `{"error": …}` if it failed:
//! - `{"op": "hello"}`: version, device class and threads.
//! - `{"op": "prepare", "dir": …, "work": {"kind": …, …}}`: loads the inputs and weights that the driver wrote to
//!   `dir`; see [`Work`]. The previous case is dropped.
//! - `{"op": "output", "path": …}`: writes what all sides must agree on as safetensors, images in NCHW: in full for
//!   `ours`, only the network's output for `candle`. It comes before `time`, which changes trained weights.
//! - `{"op": "time", "warmup": n, "iterations": m}`: `{"ms": …}`, the mean of `m` runs after `n` untimed ones, to the end of
//!   what the device does.
//!
//! The engine is `ours`, or `candle` for the same work in stock candle ops.

mod ours;
mod stock;

use std::{
    collections::HashMap,
    error::Error,
    io::{self, BufRead, Write},
    path::{Path, PathBuf},
    time::Instant,
};

use candle_core::{Device, Tensor};
use clap::{Parser, ValueEnum};
use proxyset::device::{CpuLevel, DeviceChoice, Precision, device_class};
use serde::Deserialize;
use serde_json::{Value, json};

/// As in the program.
#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Tensors by name.
type Named = HashMap<String, Tensor>;

#[derive(Parser)]
struct Args {
    engine: Engine,
    #[arg(long, default_value_t = DeviceChoice::Cpu)]
    device: DeviceChoice,
    #[arg(long, default_value_t = Precision::F32)]
    precision: Precision,
    /// Cargo adds it.
    #[arg(long)]
    bench: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Engine {
    Ours,
    Candle,
}

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
enum Command {
    Hello,
    Prepare { dir: PathBuf, work: Work },
    Output { path: PathBuf },
    Time { warmup: usize, iterations: usize },
}

/// The work to measure. Inputs are in the folder's `inputs.safetensors`, images in NCHW.
#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum Work {
    /// `x`, `weight`, `bias` and, for the output, `grad`: the gradient of `sum(grad · y)`. The gradient of `sum(y)`
    /// is timed.
    Conv2d { stride: usize, padding: usize, backward: bool },
    /// The folder is a diffusion model's; `x`, perhaps `labels`. Its noise at step `t`, without gradients.
    Denoise { t: usize },
    /// The same; `x` is the noise from which DDIM begins.
    Sample { steps: usize },
    /// Also `noise`: the gradients of the mean squared error to all parameters.
    DenoiseGradients { t: usize, parts: usize },
    /// The folder is a classifier's; `x` and `labels`. Its logits, without gradients.
    Logits,
    /// One step of adversarial training: PGD from the images themselves, then SGD on what it found.
    PgdStep { attack: Attack, sgd: Descent, parts: usize },
}

/// ℓ∞, and all batch statistics in training mode.
#[derive(Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct Attack {
    epsilon: f64,
    step_size: f64,
    steps: usize,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct Descent {
    learning_rate: f64,
    momentum: f64,
    weight_decay: f64,
}

/// Work ready to run.
trait Case {
    /// Does the timed work once.
    fn run(&mut self) -> Result<()>;

    /// What all sides must agree on.
    fn outputs(&mut self) -> Result<Named>;
}

fn inputs(dir: &Path, device: &Device) -> Result<Named> {
    Ok(candle_core::safetensors::load(dir.join("inputs.safetensors"), device)?)
}

/// Removes an input from those of a case.
fn take(inputs: &mut Named, name: &str) -> Result<Tensor> {
    inputs.remove(name).ok_or_else(|| format!("the inputs have no '{name}'").into())
}

fn time(case: &mut dyn Case, device: &Device, warmup: usize, iterations: usize) -> Result<f64> {
    for _ in 0..warmup {
        case.run()?;
    }
    device.synchronize()?;
    let start = Instant::now();
    for _ in 0..iterations {
        case.run()?;
    }
    device.synchronize()?;
    Ok(1e3 * start.elapsed().as_secs_f64() / iterations as f64)
}

fn prepared(case: &mut Option<Box<dyn Case>>) -> Result<&mut dyn Case> {
    match case {
        Some(case) => Ok(case.as_mut()),
        None => Err("nothing is prepared".into()),
    }
}

/// Serves stdin until it ends.
fn serve(prepare: fn(&Path, Work, &Device) -> Result<Box<dyn Case>>, device: &Device) -> Result<()> {
    let mut case: Option<Box<dyn Case>> = None;
    for line in io::stdin().lock().lines() {
        let line = line?;
        let answer = serde_json::from_str(&line).map_err(Into::into).and_then(|command| {
            Ok(match command {
                Command::Hello => json!({
                    "version": env!("CARGO_PKG_VERSION"),
                    "device_class": device_class(device),
                    "threads": rayon::current_num_threads(),
                }),
                Command::Prepare { dir, work } => {
                    // First, so that two large networks are never there at once.
                    case = None;
                    case = Some(prepare(&dir, work, device)?);
                    json!({})
                }
                Command::Output { path } => {
                    let outputs = prepared(&mut case)?.outputs()?;
                    candle_core::safetensors::save(&outputs, path)?;
                    json!({})
                }
                Command::Time { warmup, iterations } => {
                    json!({ "ms": time(prepared(&mut case)?, device, warmup, iterations)? })
                }
            })
        });
        let answer: Value = answer.unwrap_or_else(|e: Box<dyn Error>| json!({ "error": e.to_string() }));
        println!("{answer}");
        io::stdout().flush()?;
    }
    Ok(())
}

fn main() -> Result<()> {
    CpuLevel::check_env()?;
    let args = Args::parse();
    if let Engine::Ours = args.engine {
        // SAFETY: no other thread exists yet.
        unsafe { proxyset::process::tune() };
    }
    args.precision.set();
    let device = args.device.open()?;
    match args.engine {
        // In the pool, as the program.
        Engine::Ours => Ok(rayon::scope(|_| serve(ours::prepare, &device).map_err(|e| e.to_string()))?),
        Engine::Candle => serve(stock::prepare, &device),
    }
}
