//! Memory, arithmetic and time of a run, component by component, before anything is allocated; and which setting to
//! change where it does not fit.

use crate::config::{Attention, Config, EmaOn, Moments, Share};
use crate::engine::{ArenaPlan, DeviceFacts, Space};
use crate::model::ModelShape;
use crate::train::Layout;
use std::fmt;

/// What a run will need.
#[derive(Clone, Debug, PartialEq)]
pub struct RunPlan {
    /// Trainable elements of the model.
    pub params: usize,
    /// Trainable elements of the predictors.
    pub predictor_params: usize,
    /// Video tokens of a clip of the first grid, of which arithmetic and time are; the memory is that of the largest.
    pub tokens: usize,
    /// Bytes of the device's arena by component.
    pub memory: Vec<Component>,
    /// Bytes of the host's.
    pub host: Vec<Component>,
    /// Bytes of the engine's workspace.
    pub scratch_bytes: usize,
    /// Bytes the device has free, where known.
    pub free_bytes: Option<usize>,
    /// Bytes the host has free, where known.
    pub host_free_bytes: Option<usize>,
    /// Blocks.
    pub layers: usize,
    /// List buffers, and bytes of one.
    pub lists: (usize, usize),
    /// FLOP of one optimizer step by component: name, dense, at `keep` of the KV.
    pub flop: Vec<(&'static str, f64, f64)>,
    /// Milliseconds of one optimizer step by component: name, dense, at `keep` of the KV. Empty where the device's
    /// speeds are not known.
    pub time_ms: Vec<(&'static str, f64, f64)>,
    /// Whether the attention's time, dense and over lists, comes from the dispatch table rather than from an assumed speed.
    pub attention_measured: (bool, bool),
    /// Share of KV blocks the second column assumes.
    pub keep: f64,
    /// GPUs that the last column of the memory spreads the run over.
    pub gpus: usize,
    /// Settings that would make it fit, when it does not.
    pub advice: Vec<String>,
}

/// One line of the memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Component {
    /// What it is.
    pub name: String,
    /// Bytes on one GPU that holds the whole run.
    pub bytes: usize,
    /// Bytes on each of [`RunPlan::gpus`].
    pub per_gpu: usize,
}

/// The run does not fit on the device, or its host part not on the host.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
#[error(
    "the run does not fit: it needs {:.2} GiB{}, {:.2} GiB are free{}\n  see every component: dsv-train plan",
    gib(*.needed_bytes), if *.space == Space::Host { " of page-locked host memory" } else { "" },
    gib(*.free_bytes), .advice.iter().map(|a| format!("\n  {a}")).collect::<String>()
)]
pub struct MemoryError {
    /// Where it does not fit.
    pub space: Space,
    /// Bytes of arena and workspace.
    pub needed_bytes: usize,
    /// Bytes that are free there.
    pub free_bytes: usize,
    /// Settings that would make it fit.
    pub advice: Vec<String>,
}

/// Refuses a laid-out run that the device has no memory for, before anything is allocated.
pub fn check(config: &Config, layout: &Layout, device: &dyn DeviceFacts) -> Result<(), MemoryError> {
    let room = Room::of(device);
    let [on_device, on_host] = Room::needed(layout);
    for (space, needed_bytes, free) in
        [(Space::Device, on_device, room.device), (Space::Host, on_host, room.host)]
    {
        if let Some(free_bytes) = free.filter(|free| *free < needed_bytes) {
            return Err(MemoryError {
                space,
                needed_bytes,
                free_bytes,
                advice: advice(config, device, &room),
            });
        }
    }
    Ok(())
}

/// Free bytes, where they are known.
struct Room {
    device: Option<usize>,
    host: Option<usize>,
}

impl Room {
    fn of(device: &dyn DeviceFacts) -> Room {
        Room { device: device.free_bytes(), host: device.host_free_bytes() }
    }

    /// Bytes that a layout needs of the device, and of the host.
    fn needed(layout: &Layout) -> [usize; 2] {
        [layout.total_bytes(), layout.arena.host_bytes()]
    }

    fn holds(&self, [device, host]: [usize; 2]) -> bool {
        self.device.is_none_or(|free| device <= free) && self.host.is_none_or(|free| host <= free)
    }
}

/// Half of the present budget for what blocks keep, to a tenth of a GiB; `None` where that is no less, or where the present
/// one has room for no more than two blocks' attention outputs (in bf16).
fn smaller_kept_budget(config: &Config) -> Option<f64> {
    let tokens = config.grids().into_iter().map(|grid| config.of_grid(grid).tokens()).max().unwrap_or(0);
    let output = gib(2 * config.data.batch_size * tokens * config.dim());
    let all = config.model.layers as f64 * output;
    let present = if config.train.kept_budget_gb > 0.0 { config.train.kept_budget_gb.min(all) } else { all };
    let half = (5.0 * present).ceil() / 10.0;
    (half < present && present > 2.0 * output).then_some(half)
}

/// Settings that make a run fit: each alone where one is enough, else together, cheapest first.
fn advice(config: &Config, device: &dyn DeviceFacts, room: &Room) -> Vec<String> {
    type Change = (fn(&Config) -> bool, fn(&mut Config), fn(&Config) -> String);
    let changes: [Change; 11] = [
        (|c| !c.train.recompute, |c| c.train.recompute = true, |_| "train.recompute=true".into()),
        (
            |c| c.ema_space() == Some(Space::Device),
            |c| c.train.ema_on = EmaOn::Host,
            |_| "train.ema_on=host".into(),
        ),
        (
            |c| !c.device.graphs && c.model.layers > 2 && smaller_kept_budget(c).is_some(),
            |c| c.train.kept_budget_gb = smaller_kept_budget(c).unwrap_or(c.train.kept_budget_gb),
            |c| format!("train.kept_budget_gb={}", c.train.kept_budget_gb),
        ),
        (
            |c| c.train.moments == Moments::Device,
            |c| c.train.moments = Moments::Host,
            |_| "train.moments=host".into(),
        ),
        (
            |c| c.train.moments == Moments::Device,
            |c| c.train.moments = Moments::Coded,
            |_| "train.moments=8bit".into(),
        ),
        (|c| c.train.ema_decay > 0.0, |c| c.train.ema_decay = 0.0, |_| "train.ema_decay=0".into()),
        (
            |c| c.data.batch_size > 1,
            |c| {
                c.train.grad_accumulation *= c.data.batch_size;
                c.data.batch_size = 1;
            },
            |c| format!("data.batch_size=1 --set train.grad_accumulation={}", c.train.grad_accumulation),
        ),
        (
            |c| !c.data.buckets.is_empty(),
            |c| {
                let largest =
                    (0..c.data.buckets.len()).max_by_key(|&i| c.data.buckets[i].iter().product::<usize>());
                largest.map(|i| c.data.buckets.remove(i));
            },
            |c| format!("data.buckets='{:?}'", c.data.buckets),
        ),
        (
            // By need lists are as wide as dsv.max_keep, whatever the mean.
            |c| {
                let even = c.dsv.attention == Attention::Fixed && c.dsv.share == Share::Even;
                even && c.dsv.keep.is_some_and(|k| k > 0.05)
            },
            |c| c.dsv.keep = c.dsv.keep.map(|k| (k / 2.0).max(0.05)),
            |c| format!("dsv.keep={}", c.dsv.keep.unwrap_or_default()),
        ),
        (
            |c| c.data.buckets.is_empty() && c.data.frames / c.model.patch[0] > 1,
            |c| c.data.frames = (c.data.frames / c.model.patch[0] / 2).max(1) * c.model.patch[0],
            |c| format!("data.frames={}", c.data.frames),
        ),
        (
            |c| c.model.layers > 1,
            |c| c.model.layers -= (c.model.layers / 8).max(1),
            |c| format!("model.layers={}", c.model.layers),
        ),
    ];
    let needs = |c: &Config| Room::needed(&Layout::new(c, device, None));
    let fits = |c: &Config| room.holds(needs(c));
    let line = |sets: &str, needed: [usize; 2]| {
        let verdict = if room.holds(needed) { "fits" } else { "still does not fit" };
        let [on_device, on_host] = needed.map(gib);
        let host = if on_host > 0.0 { format!(" and {on_host:.2} GiB of the host's") } else { String::new() };
        format!("--set {sets}: {on_device:.2} GiB{host}, {verdict}")
    };
    let mut alone = Vec::new();
    for (applies, change, name) in changes.iter().filter(|(applies, ..)| applies(config)) {
        let mut one = config.clone();
        // Halving may have to go on.
        while applies(&one) && !fits(&one) {
            change(&mut one);
        }
        if fits(&one) {
            alone.push(line(&name(&one), needs(&one)));
        }
    }
    if !alone.is_empty() {
        return alone;
    }
    let (mut all, mut sets) = (config.clone(), Vec::new());
    for (applies, change, name) in &changes {
        let mut changed = false;
        while applies(&all) && !fits(&all) {
            let mut next = all.clone();
            change(&mut next);
            if room.host.is_some_and(|free| needs(&next)[1] > free) {
                break;
            }
            (all, changed) = (next, true);
        }
        if changed {
            sets.push(name(&all));
        }
    }
    vec![line(&sets.join(" --set "), needs(&all))]
}

/// Plans a training run on a device; the last column of its memory spreads it over `gpus` of them.
pub fn plan(config: &Config, device: &dyn DeviceFacts, gpus: usize) -> RunPlan {
    let layout = Layout::new(config, device, None);
    let shape = &layout.model.shape;
    let (params, _) = shape.params();
    let predictor = layout
        .model
        .predictors
        .as_ref()
        .map_or(0, |p| crate::predictor::Predictors::params(&p.shape, shape.dim()).0.count());
    let keep = match shape.window {
        Some(w) => w.kept,
        None => config.dsv.keep.unwrap_or(config.dsv.max_keep),
    };
    let flop = flop(shape, config, keep);
    let room = Room::of(device);
    let advice = if room.holds(Room::needed(&layout)) { Vec::new() } else { advice(config, device, &room) };
    let (time_ms, attention_measured) = time(shape, config, device, keep, &flop, params.count());
    RunPlan {
        params: params.count(),
        predictor_params: predictor,
        tokens: shape.patch.tokens(),
        memory: components(&layout.arena, Space::Device, gpus, shape.layers),
        host: components(&layout.arena, Space::Host, gpus, shape.layers),
        scratch_bytes: layout.scratch_bytes,
        free_bytes: room.device,
        host_free_bytes: room.host,
        layers: shape.layers,
        lists: (layout.list_slots, layout.list_bytes),
        flop,
        time_ms,
        attention_measured,
        keep,
        gpus,
        advice,
    }
}

/// How a component is spread over GPUs.
#[derive(Clone, Copy)]
enum Spread {
    /// Each has its part of the elements.
    Sharded,
    /// Each has its part, and those of two blocks at a time whole.
    Gathered,
    /// Each has its part of the tokens.
    Tokens,
    /// Each has all of it.
    Whole,
}

/// Lines of the memory: what an allocation's label is shown as, and how it is spread.
fn component(label: &str) -> (String, Spread) {
    let (group, name) = label.split_once('/').unwrap_or((label, ""));
    match (group, name) {
        ("model", "compute copy") => ("weights (compute copy)".into(), Spread::Gathered),
        ("model", "master") => ("master weights".into(), Spread::Sharded),
        ("model", "gradients") => ("gradients".into(), Spread::Sharded),
        ("model", "first moment" | "second moment") => ("moments".into(), Spread::Sharded),
        ("model", "averaged weights") => ("averaged weights".into(), Spread::Sharded),
        ("predictors", "low-rank" | "low-rank gradient") => {
            ("predictors: low-rank scores".into(), Spread::Tokens)
        }
        ("predictors", _) => ("predictors: weights, moments, gradients".into(), Spread::Whole),
        ("kept per block", "input" | "last output") => ("kept per block: inputs".into(), Spread::Tokens),
        ("kept per block", "attention output") => {
            ("kept per block: attention outputs".into(), Spread::Tokens)
        }
        ("kept per block", _) => ("kept per block: log-sum-exp".into(), Spread::Tokens),
        ("lists", _) => ("KV lists".into(), Spread::Tokens),
        ("staging", _) => ("staging of what lies on the host".into(), Spread::Whole),
        ("block work", "mlp up" | "mlp act") => ("activations of a block: MLP".into(), Spread::Tokens),
        ("block work", name) if name.starts_with("cross") => {
            ("activations of a block: cross-attention".into(), Spread::Tokens)
        }
        ("block work", _) => ("activations of a block: attention, norms".into(), Spread::Tokens),
        ("gradients of activations", _) => ("gradients of activations".into(), Spread::Tokens),
        _ => ("inputs, conditioning, head".into(), Spread::Tokens),
    }
}

fn components(arena: &ArenaPlan, space: Space, gpus: usize, layers: usize) -> Vec<Component> {
    let mut out: Vec<Component> = Vec::new();
    for allocation in arena.allocations().iter().filter(|a| a.space == space) {
        let (name, spread) = component(&allocation.label);
        let bytes = allocation.bytes;
        let part = bytes.div_ceil(gpus);
        let per_gpu = match spread {
            Spread::Sharded | Spread::Tokens => part,
            Spread::Gathered => (part + 2 * bytes / layers).min(bytes),
            Spread::Whole => bytes,
        };
        match out.iter_mut().find(|c| c.name == name) {
            Some(c) => {
                c.bytes += bytes;
                c.per_gpu += per_gpu;
            }
            None => out.push(Component { name, bytes, per_gpu }),
        }
    }
    out
}

/// Bytes a second of copies from or to page-locked memory over PCIe 5.
const HOST_COPY: f64 = 50e9;

/// Name, milliseconds dense, and at `keep`.
type PartMs = (&'static str, f64, f64);

/// Milliseconds of a step by component, dense and at `keep`: products and attention at their speeds, the rest at the
/// speed of memory. Second: whether the table knew the attention, dense and over lists.
fn time(
    shape: &ModelShape,
    config: &Config,
    device: &dyn DeviceFacts,
    keep: f64,
    flop: &[(&'static str, f64, f64)],
    params: usize,
) -> (Vec<PartMs>, (bool, bool)) {
    let Some(rates) = device.rates() else { return (Vec::new(), (false, false)) };
    let calls = (config.train.grad_accumulation * shape.layers) as f64;
    let attn = shape.self_attn();
    let lists = shape.predictor.map(|p| p.lists).or(shape.window.map(|w| w.lists));
    let dense_us = device.attention_us(&attn, None);
    let sparse_us = lists.and_then(|l| device.attention_us(&attn, Some((&l, 1.0 - keep))));
    let mut out = Vec::new();
    for &(name, dense, sparse) in flop {
        let ms = |flop: f64, rate: f64| 1e3 * flop / rate;
        out.push(match name {
            "self-attention" => {
                let dense_ms = dense_us.map_or(ms(dense, rates.attention), |us| us * calls * 1e-3);
                let sparse_ms = match (lists, sparse_us) {
                    (None, _) => dense_ms,
                    (Some(_), Some(us)) => us * calls * 1e-3,
                    (Some(l), None) if l.kernel_lists().is_gather() => {
                        ms(sparse, rates.gather[usize::from(l.query_group >= 128)])
                    }
                    (Some(_), None) => ms(sparse, rates.attention),
                };
                ("self-attention", dense_ms, sparse_ms)
            }
            // Counted with the table's line where there is one.
            "selection" if sparse_us.is_some() => continue,
            // Narrow products: their speed is that of memory and launches.
            "predictors" | "selection" => {
                (name, ms(dense, rates.matmul / 4.0), ms(sparse, rates.matmul / 4.0))
            }
            _ => (name, ms(dense, rates.matmul), ms(sparse, rates.matmul)),
        });
    }
    // Values read and written beside products and attention, in widths of the model: norms, rotations and residuals 11
    // forward, 22 backward (bias gradients among them), 10 recomputed; the activation once forward and twice backward
    // (NOTES.md has the table).
    let (dim, pre, hidden) =
        (shape.dim() as f64, shape.mlp.pre_width(shape.hidden) as f64, shape.hidden as f64);
    let recomputed = if config.train.recompute { 10.0 } else { 0.0 };
    let widths = 33.0 + recomputed + 3.0 * (pre + hidden) / dim;
    let pointwise = 2.0 * shape.rows() as f64 * dim * widths * calls;
    // Master and both moments read and written, the gradient read twice and zeroed, the copy written.
    let moments = if config.train.moments == Moments::Coded { 4.125 } else { 16.0 };
    let averages = if config.ema_space() == Some(Space::Device) { 12.0 } else { 0.0 };
    let ms = |bytes: f64| 1e3 * bytes / rates.memory;
    let optimizer = ms(params as f64 * (22.0 + moments + averages));
    out.push(("norms, residuals, activations", ms(pointwise), ms(pointwise)));
    out.push(("optimizer", optimizer, optimizer));
    if config.train.moments == Moments::Host {
        // Both directions at once. Averages and what blocks keep are copied beside the ops.
        let passed = 1e3 * params as f64 * 8.0 / HOST_COPY;
        out.push(("moments from and to the host", passed, passed));
    }
    (out, (dense_us.is_some(), sparse_us.is_some() || lists.is_none() && dense_us.is_some()))
}

/// FLOP (two per multiply-add) of one step: forward 1, backward 2, recompute 1 where on, but for the MLP's last product;
/// attention forward 1, backward 2.5, never recomputed.
fn flop(shape: &ModelShape, config: &Config, keep: f64) -> Vec<(&'static str, f64, f64)> {
    let per_step = (config.train.grad_accumulation * shape.layers) as f64;
    let passes = if config.train.recompute { 4.0 } else { 3.0 };
    let (rows, dim) = (shape.rows() as f64, shape.dim() as f64);
    let (s, text) = (shape.patch.tokens() as f64, shape.text_tokens as f64);
    let text_rows = shape.patch.batch as f64 * text;
    let linear = |rows: f64, inputs: f64, out: f64| 2.0 * rows * inputs * out * per_step * passes;
    let qkvo = linear(rows, dim, 4.0 * dim);
    let cross = linear(rows, dim, 2.0 * dim) + linear(text_rows, dim, 2.0 * dim);
    let (hidden, pre) = (shape.hidden as f64, shape.mlp.pre_width(shape.hidden) as f64);
    let mlp = linear(rows, dim, pre) + linear(rows, hidden, dim) * 3.0 / passes;
    let attention = 4.0 * rows * s * dim * per_step * 3.5;
    // Forward and backward, and the forward once more in the recompute.
    let cross_attention = 4.0 * rows * text * dim * per_step * (passes + 0.5);
    let mut out = vec![
        ("self-attention", attention, attention * keep),
        ("attention projections", qkvo, qkvo),
        ("MLP", mlp, mlp),
        ("cross-attention", cross + cross_attention, cross + cross_attention),
    ];
    if let Some(p) = &shape.predictor {
        let low = 2.0 * shape.heads as f64 * p.d_lr as f64;
        let map = 2.0 * 2.0 * rows * dim * low * per_step;
        let (d, r) = (shape.head_dim as f64, p.d_lr as f64);
        // Gram matrices, and their products with every query and key, per head.
        let gram = 2.0 * rows * shape.heads as f64 * (r * r + r * d + d * d) * 3.0 * per_step;
        let groups = p.lists.groups() as f64;
        let scores = 2.0 * shape.patch.batch as f64 * shape.heads as f64 * groups * s * r * per_step;
        out.push(("predictors", map + gram, map + gram));
        out.push(("selection", 0.0, scores));
    }
    out
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

impl RunPlan {
    /// Bytes of arena and workspace.
    pub fn total_bytes(&self) -> usize {
        self.memory.iter().map(|c| c.bytes).sum::<usize>() + self.scratch_bytes
    }

    /// Bytes of page-locked host memory.
    pub fn host_bytes(&self) -> usize {
        self.host.iter().map(|c| c.bytes).sum()
    }

    /// Whether device and host have room for it, as far as that is known.
    pub fn fits(&self) -> bool {
        let room = Room { device: self.free_bytes, host: self.host_free_bytes };
        room.holds([self.total_bytes(), self.host_bytes()])
    }

    /// The same on each of [`RunPlan::gpus`].
    pub fn total_per_gpu(&self) -> usize {
        self.memory.iter().map(|c| c.per_gpu).sum::<usize>() + self.scratch_bytes.div_ceil(self.gpus)
    }

    /// Milliseconds of one optimizer step, dense and at `keep`; `None` where the device's speeds are not known.
    pub fn step_ms(&self) -> Option<(f64, f64)> {
        let sum = |pick: fn(&(&str, f64, f64)) -> f64| self.time_ms.iter().map(pick).sum::<f64>();
        (!self.time_ms.is_empty()).then(|| (sum(|x| x.1), sum(|x| x.2)))
    }
}

impl fmt::Display for RunPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "parameters {:.1} M, predictors {:.2} M, {} tokens a clip\n",
            self.params as f64 / 1e6,
            self.predictor_params as f64 / 1e6,
            self.tokens
        )?;
        let several = self.gpus > 1;
        let line = |f: &mut fmt::Formatter<'_>, name: &str, whole: usize, part: usize| {
            write!(f, "  {name:<42} {:>10.4}", gib(whole))?;
            if several { write!(f, " {:>14.4}", gib(part)) } else { Ok(()) }
        };
        write!(f, "{:<44} {:>10}", "memory, GiB", "one GPU")?;
        writeln!(
            f,
            "{}",
            if several { format!(" {:>14}", format!("each of {}", self.gpus)) } else { String::new() }
        )?;
        for c in &self.memory {
            line(f, &c.name, c.bytes, c.per_gpu)?;
            writeln!(f)?;
        }
        line(f, "workspace", self.scratch_bytes, self.scratch_bytes.div_ceil(self.gpus))?;
        writeln!(f)?;
        line(f, "total", self.total_bytes(), self.total_per_gpu())?;
        match self.free_bytes {
            Some(free) if free < self.total_bytes() => {
                writeln!(f, "   more than the {:.2} GiB that are free", gib(free))?;
            }
            Some(free) => writeln!(f, "   of {:.2} GiB free", gib(free))?,
            None => writeln!(f)?,
        }
        if !self.host.is_empty() {
            writeln!(f, "page-locked host memory, GiB")?;
            for c in &self.host {
                line(f, &c.name, c.bytes, c.per_gpu)?;
                writeln!(f)?;
            }
            line(f, "total", self.host_bytes(), self.host.iter().map(|c| c.per_gpu).sum())?;
            match self.host_free_bytes {
                Some(free) if free < self.host_bytes() => {
                    writeln!(f, "   more than the {:.2} GiB that are free", gib(free))?;
                }
                Some(free) => writeln!(f, "   of {:.2} GiB free", gib(free))?,
                None => writeln!(f, "   (what the host has is not known here)")?,
            }
        }
        for advice in &self.advice {
            writeln!(f, "  {advice}")?;
        }
        if let (true, Some(free)) = (several, self.free_bytes) {
            let fits = if self.total_per_gpu() <= free { "fits" } else { "does not fit" };
            writeln!(
                f,
                "  {} GPUs: {fits}. A dry run: training is on one GPU. Assumed: weights, gradients and optimizer sharded,\n  weights of two blocks gathered at a time, tokens split",
                self.gpus
            )?;
        }
        let (lists, bytes) = self.lists;
        writeln!(f, "  lists: {lists} blocks, {:.4} GiB each", gib(bytes))?;
        if bytes > 0 && lists < self.layers {
            writeln!(
                f,
                "  the other {} blocks stay dense for want of memory: a train.kept_budget_gb gives every block lists on the host",
                self.layers - lists
            )?;
        }
        writeln!(f)?;
        let kept = format!("{:.0} % kept", 100.0 * self.keep);
        let table = |f: &mut fmt::Formatter<'_>, title: &str, rows: &[(&str, f64, f64)], unit: f64| {
            writeln!(f, "{title:<44} {:>12} {:>12}", "dense", kept)?;
            for (name, dense, sparse) in rows {
                writeln!(f, "  {name:<42} {:>12.4} {:>12.4}", dense * unit, sparse * unit)?;
            }
            let sum = |pick: fn(&(&str, f64, f64)) -> f64| rows.iter().map(pick).sum::<f64>() * unit;
            write!(f, "  {:<42} {:>12.4} {:>12.4}", "total", sum(|x| x.1), sum(|x| x.2))
        };
        table(f, "TFLOP of a step", &self.flop, 1e-12)?;
        if self.time_ms.is_empty() {
            return write!(f, "\n\ntime: not estimated for this device");
        }
        writeln!(f, "\n")?;
        table(f, "ms of a step, estimated", &self.time_ms, 1.0)?;
        let from = match self.attention_measured {
            (true, true) => "attention as the dispatch table measured it",
            (true, false) => {
                "dense attention as the dispatch table measured it, over lists at an assumed speed (it has no line for them)"
            }
            _ => "attention at an assumed speed (the table has no line for it)",
        };
        write!(f, "\n  {from}; products and memory at assumed speeds")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{CpuEngine, PlannedGpu};

    #[test]
    fn presets_have_the_papers_sizes() {
        let engine = CpuEngine::<f32>::new();
        for (preset, low, high) in [("0.8b", 0.6e9, 1.1e9), ("2.7b", 2.4e9, 3.1e9), ("30b", 24e9, 34e9)] {
            let config = Config::preset(preset).unwrap();
            let params = plan(&config, &engine, 1).params as f64;
            assert!((low..high).contains(&params), "{preset}: {params:e} parameters");
        }
    }

    #[test]
    fn attention_dominates_long_sequences() {
        let engine = CpuEngine::<f32>::new();
        let mut config = Config::preset("2.7b").unwrap();
        (config.data.frames, config.data.height, config.data.width) = (50, 128, 128);
        config.dsv.memory_budget_gb = 4000.0;
        let p = plan(&config, &engine, 1);
        assert_eq!(p.tokens, 204_800);
        let share = p.flop[0].1 / p.flop.iter().map(|x| x.1).sum::<f64>();
        assert!(share > 0.85, "the paper says more than 90 % at 200k tokens, found {share}");
        let text = p.to_string();
        for wanted in [
            "204800 tokens a clip",
            "kept per block: inputs",
            "moments",
            "time: not estimated",
            "lists: 32 blocks",
            "self-attention",
        ] {
            assert!(text.contains(wanted), "no '{wanted}' in\n{text}");
        }
    }

    #[test]
    fn fine_lists_have_no_inverse_and_an_assumed_speed() {
        let gpu = PlannedGpu::new("h100", false).unwrap();
        let mut config = Config::preset("2.7b").unwrap();
        config.dsv.keep = Some(0.1);
        let of = |group: usize, block: usize| {
            let mut config = config.clone();
            (config.dsv.query_group, config.dsv.kv_block) = (group, block);
            plan(&config, &gpu, 1)
        };
        // 16 heads, 512 groups, half of 4,096 units of 8 tokens, and a count: ids alone, where blocks have offsets too.
        assert_eq!(of(64, 8).lists.1, 16 * 512 * 4 * (2_048 + 1));
        assert_eq!(
            of(64, 64).lists.1,
            16 * 4 * 512 * (2 * 256 + 1) + (16usize * 4 * 513).next_multiple_of(256)
        );
        let ms = |p: &RunPlan| p.time_ms[0].2;
        let (coarse, fine, wide) = (of(64, 64), of(64, 8), of(128, 8));
        assert!(ms(&fine) > ms(&coarse) && ms(&fine) > ms(&wide), "{fine}");
        assert_eq!((coarse.attention_measured, fine.attention_measured), ((true, true), (true, false)));
        assert!(fine.to_string().contains("over lists at an assumed speed"), "{fine}");
    }

    #[test]
    fn components_are_the_whole_arena() {
        let gpu = PlannedGpu::new("h100", false).unwrap();
        let config = Config::preset("2.7b").unwrap();
        let p = plan(&config, &gpu, 1);
        let layout = Layout::new(&config, &gpu, None);
        assert_eq!(p.memory.iter().map(|c| c.bytes).sum::<usize>(), layout.arena.total_bytes());
        assert!(p.memory.iter().all(|c| c.per_gpu == c.bytes || c.name.starts_with("weights")));
        let of = |name: &str| p.memory.iter().find(|c| c.name == name).unwrap().bytes as f64;
        let params = p.params as f64;
        for (name, each) in
            [("weights (compute copy)", 2.0), ("master weights", 4.0), ("gradients", 4.0), ("moments", 8.0)]
        {
            assert!(
                (of(name) / params - each).abs() < 0.01,
                "{name}: {} bytes a parameter",
                of(name) / params
            );
        }
        // Moments elsewhere, or of eight bits and a scale each 128.
        for (moments, on_device, on_host) in [(Moments::Host, 0.0, 8.0), (Moments::Coded, 2.0625, 0.0)] {
            let mut config = config.clone();
            config.train.moments = moments;
            let p = plan(&config, &gpu, 1);
            let each = |components: &[Component]| {
                components.iter().find(|c| c.name == "moments").map_or(0.0, |c| c.bytes as f64) / params
            };
            assert!(
                (each(&p.memory) - on_device).abs() < 0.01 && (each(&p.host) - on_host).abs() < 0.01,
                "{p}"
            );
            assert!(moments != Moments::Host || p.to_string().contains("page-locked host memory"), "{p}");
        }
        // 32 blocks and the last output, 32,768 tokens of 2,048 channels, bf16.
        assert_eq!(of("kept per block: inputs") as usize, 33 * 32_768 * 2_048 * 2);
    }

    #[test]
    fn a_run_that_does_not_fit_names_the_setting_that_helps() {
        let gpu = PlannedGpu::new("h100", false).unwrap();
        let mut config = Config::preset("2.7b").unwrap();
        assert_eq!(plan(&config, &gpu, 1).advice, Vec::<String>::new(), "2.7b at 32k fits on 80 GB");
        config.train.recompute = false;
        let p = plan(&config, &gpu, 1);
        assert!(p.total_bytes() > p.free_bytes.unwrap());
        assert!(
            p.advice[0].starts_with("--set train.recompute=true: ") && p.advice[0].ends_with("fits"),
            "{p}"
        );
        // What it says is true.
        config.train.recompute = true;
        let p = plan(&config, &gpu, 1);
        assert!(p.total_bytes() <= p.free_bytes.unwrap());
        // Nothing helps alone.
        config.data.batch_size = 64;
        config.model.layers = 400;
        let p = plan(&config, &gpu, 1);
        assert!(p.advice.len() == 1 && p.advice[0].contains("data.batch_size=1"), "{:?}", p.advice);
        assert!(p.advice[0].contains("model.layers=") && p.advice[0].ends_with(" fits"), "{:?}", p.advice);
        let layout = Layout::new(&config, &gpu, None);
        let error = check(&config, &layout, &gpu).unwrap_err().to_string();
        assert!(error.contains(&p.advice[0]) && error.contains("dsv-train plan"), "{error}");
    }

    #[test]
    fn the_committed_configurations_fit_a_gpu_of_80_gb() {
        let gpu = PlannedGpu::new("h100", false).unwrap();
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/configs");
        let mut planned = Vec::new();
        for file in std::fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            if path.extension().is_none_or(|e| e != "toml") {
                continue;
            }
            let config = Config::load(Some(&path), None, &[]).unwrap();
            let p = plan(&config, &gpu, 1);
            assert!(p.fits() && p.advice.is_empty(), "{path:?}\n{p}");
            assert_eq!(p.lists.0, config.model.layers, "{path:?}: every block has lists\n{p}");
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            planned.push((name, p.tokens, config.model.layers, p.host_bytes()));
        }
        planned.sort();
        let gb = |name: &str| {
            let at = planned.iter().find(|p| p.0 == name).unwrap_or_else(|| panic!("no configs/{name}.toml"));
            (at.1 >> 10, at.2, (at.3 as f64 / 1e9).round() as usize)
        };
        // Tokens in units of 1,024, blocks, GB of host memory.
        for (name, wanted) in [
            ("0.8b-32k", (32, 28, 0)),
            ("0.8b-64k", (64, 28, 0)),
            ("0.8b-128k", (128, 28, 0)),
            ("2.7b-32k", (32, 32, 11)),
            ("2.7b-64k", (64, 32, 18)),
            ("2.7b-128k", (128, 32, 55)),
            ("2.7b-128k-8-layers", (128, 8, 0)),
            ("30b-block", (32, 1, 0)),
        ] {
            assert_eq!(gb(name), wanted, "{name}");
        }
    }

    #[test]
    fn presets_that_do_not_fit_are_told_the_key() {
        let gpu = PlannedGpu::new("h100", false).unwrap();
        let of = |preset: &str, sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
            plan(&Config::from_toml("", "a test", Some(preset), &sets).unwrap(), &gpu, 1)
        };
        for (preset, frames) in [("0.8b", 32), ("0.8b", 64), ("0.8b", 128), ("2.7b", 32), ("2.7b", 64)] {
            let p = of(preset, &[&format!("data.frames={frames}")]);
            assert!(p.fits() && p.advice.is_empty(), "{preset}, {frames} frames\n{p}");
        }
        let with_averages = of("2.7b", &["data.frames=64", "train.ema_decay=0.999"]);
        assert!(!with_averages.fits());
        assert!(with_averages.advice[0].starts_with("--set train.ema_on=host: "), "{with_averages}");
        let long = of("2.7b", &["data.frames=128"]);
        assert!(!long.fits());
        for key in ["train.moments=host", "model.layers=", "data.frames="] {
            let told =
                long.advice.iter().any(|a| a.starts_with(&format!("--set {key}")) && a.ends_with("fits"));
            assert!(told, "{key}\n{long}");
        }
        // Moments on the host alone leave room for few lists, and the plan says so.
        let few = of("2.7b", &["data.frames=128", "train.moments=host"]);
        assert!(few.fits() && few.lists.0 < 32 && few.to_string().contains("stay dense"), "{few}");
        let all = of("2.7b", &["data.frames=128", "train.moments=host", "train.kept_budget_gb=4"]);
        assert!(all.fits() && all.lists.0 == 32 && !all.to_string().contains("stay dense"), "{all}");
        let ms = |p: &RunPlan| p.time_ms.iter().find(|t| t.0.starts_with("moments")).map(|t| t.1);
        assert!(ms(&all).is_some_and(|ms| (300.0..600.0).contains(&ms)) && ms(&long).is_none(), "{all}");
        let thirty = of("30b", &[]);
        assert!(thirty.advice.iter().any(|a| a.contains("model.layers=")), "{thirty}");
    }

    #[test]
    fn the_30b_preset_is_spread_over_gpus() {
        let gpu = PlannedGpu::new("h100", false).unwrap();
        let config = Config::preset("30b").unwrap();
        let one = plan(&config, &gpu, 1);
        let sixteen = plan(&config, &gpu, 16);
        assert!(one.total_bytes() > one.free_bytes.unwrap());
        assert_eq!(one.total_bytes(), sixteen.total_bytes());
        assert!(sixteen.total_per_gpu() < one.total_bytes() / 8);
        assert!(sixteen.total_per_gpu() <= one.free_bytes.unwrap(), "{sixteen}");
        let text = sixteen.to_string();
        assert!(
            text.contains("each of 16") && text.contains("16 GPUs: fits") && text.contains("assumed speed"),
            "{text}"
        );
    }

    #[test]
    fn estimated_time_falls_with_what_is_kept() {
        let gpu = PlannedGpu::new("h100", false).unwrap();
        let mut config = Config::preset("2.7b").unwrap();
        config.dsv.keep = Some(0.1);
        let p = plan(&config, &gpu, 1);
        let (dense, sparse) = p.step_ms().unwrap();
        // 32 layers, 93 ms a layer in a good framework, 50 ms with lists.
        assert!((1500.0..6000.0).contains(&dense) && sparse < 0.75 * dense, "{p}");
        assert!(p.attention_measured == (true, true) && p.to_string().contains("ms of a step, estimated"));
    }
}
