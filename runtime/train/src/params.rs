//! Parameters: names, shapes, initial values, and their place in flat master, gradient, moment and
//! compute buffers.

use crate::config;
use crate::engine::{
    ArenaPlan, Buf, Coded, Done, Dtype, Engine, EngineError, Moments, PARAM_ALIGN, Space, codes_of, words_of,
};
use crate::offload::Ring;
use crate::rng::{self, Purpose};
use dsv_reference::layers::eight_bits::{self, Moment};
use std::ops::Range;

/// How a parameter begins.
#[derive(Copy, Clone, Debug, PartialEq)]
pub enum Init {
    /// Normal with this standard deviation.
    Normal(f32),
    /// One value everywhere.
    Constant(f32),
}

/// One parameter tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Unique, dotted: `block.3.qkv.weight`.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Initial values.
    pub init: Init,
    /// Whether weight decay applies (matrices yes; biases, norms and tables no).
    pub decay: bool,
}

impl ParamSpec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
    /// True for a tensor of no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Names one parameter of a [`ParamPlan`].
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct ParamId(usize);

/// Collects parameters before anything is laid out.
#[derive(Clone, Debug, Default)]
pub struct ParamPlan {
    specs: Vec<ParamSpec>,
}

impl ParamPlan {
    /// Adds a parameter.
    pub fn add(&mut self, name: String, shape: &[usize], init: Init, decay: bool) -> ParamId {
        self.specs.push(ParamSpec { name, shape: shape.to_vec(), init, decay });
        ParamId(self.specs.len() - 1)
    }
    /// Adds a `[out, inputs]` matrix and its `[out]` bias; `std` 0 begins at zero.
    pub fn linear(&mut self, name: &str, out: usize, inputs: usize, std: f32) -> Linear {
        Linear {
            weight: self.add(format!("{name}.weight"), &[out, inputs], Init::Normal(std), true),
            bias: self.add(format!("{name}.bias"), &[out], Init::Constant(0.0), false),
            out,
            inputs,
        }
    }
    /// Trainable elements, without padding.
    pub fn count(&self) -> usize {
        self.specs.iter().map(ParamSpec::len).sum()
    }
    /// Every parameter in order of [`ParamPlan::add`].
    pub fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }
    /// Reserves the flat buffers: decayed tensors first, each at a multiple of [`PARAM_ALIGN`] elements.
    pub fn reserve(self, plan: &mut ArenaPlan, label: &str, keeps: Keeps) -> ParamSet {
        let mut order: Vec<usize> = (0..self.specs.len()).collect();
        order.sort_by_key(|&i| !self.specs[i].decay);
        let mut offsets = vec![0; self.specs.len()];
        let (mut end, mut decayed) = (0, 0);
        for &i in &order {
            offsets[i] = end;
            end += self.specs[i].len().next_multiple_of(PARAM_ALIGN);
            if self.specs[i].decay {
                decayed = end;
            }
        }
        let flat_in = |plan: &mut ArenaPlan, space: Space, what: &str| {
            plan.alloc_in(space, &format!("{label}/{what}"), Dtype::F32, end)
        };
        let flat = |plan: &mut ArenaPlan, what: &str| flat_in(plan, Space::Device, what);
        let coded = |plan: &mut ArenaPlan, what: &str| Coded {
            codes: plan.i32(&format!("{label}/{what}"), end / 4),
            scales: plan.f32(&format!("{label}/{what}"), end / PARAM_ALIGN),
        };
        let moments = |plan: &mut ArenaPlan, kind: config::Moments| {
            let (first, second) = ("first moment", "second moment");
            let space = if kind == config::Moments::Host { Space::Host } else { Space::Device };
            match kind {
                config::Moments::Coded => Moments::Coded { m: coded(plan, first), v: coded(plan, second) },
                config::Moments::Device | config::Moments::Host => {
                    Moments::Full { m: flat_in(plan, space, first), v: flat_in(plan, space, second) }
                }
            }
        };
        let on_host = keeps.moments == Some(config::Moments::Host);
        ParamSet {
            master: flat(plan, "master"),
            copy: plan.act(&format!("{label}/compute copy"), end),
            optimizer: keeps.moments.map(|kind| OptimizerState {
                grad: flat(plan, "gradients"),
                moments: moments(plan, kind),
                segments: plan.i32(&format!("{label}/segments"), order.len() + 1),
            }),
            moments_ring: on_host.then(|| Ring::reserve(plan, "staging/moments", 2, end, false)),
            ema: keeps.ema.map(|space| flat_in(plan, space, "averaged weights")),
            ema_ring: (keeps.ema == Some(Space::Host))
                .then(|| Ring::reserve(plan, "staging/averaged weights", 1, end, true)),
            keys: plan.i32(&format!("{label}/init key"), 2),
            specs: self.specs,
            offsets,
            order,
            decayed,
        }
    }
}

/// A linear map's parameters: `y = x w^T + b`.
#[derive(Copy, Clone, Debug)]
pub struct Linear {
    /// `[out, inputs]`.
    pub weight: ParamId,
    /// `[out]`.
    pub bias: ParamId,
    /// Rows of the weight.
    pub out: usize,
    /// Columns of the weight.
    pub inputs: usize,
}

/// What a run keeps of parameters beside the weights that compute, and where.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Keeps {
    /// Gradients, and moments of this kind; `None` where nothing is trained.
    pub moments: Option<config::Moments>,
    /// Averaged weights.
    pub ema: Option<Space>,
}

/// Ops on some elements of a set, and the moments of these.
pub type Update<'a> = dyn FnMut(&mut dyn Engine, Range<usize>, Moments) + 'a;

/// One of a set's flat arrays, in the form in which it is kept. On the host it is f32.
#[derive(Copy, Clone, Debug)]
pub enum Flat {
    /// `F32`.
    Values(Buf),
    /// A moment in eight bits; what is read and written back has the same codes.
    Coded(Coded, Moment),
}

/// Flat buffers an optimizer needs beside the weights.
#[derive(Copy, Clone, Debug)]
pub struct OptimizerState {
    /// Gradients, `F32`.
    pub grad: Buf,
    /// AdamW's moments.
    pub moments: Moments,
    /// Tensor boundaries in units of [`PARAM_ALIGN`], in flat order, `I32`.
    pub segments: Buf,
}

/// Parameters laid out in one arena.
#[derive(Clone, Debug)]
pub struct ParamSet {
    /// Flat master weights, `F32`.
    pub master: Buf,
    /// Flat compute copy, `Act`.
    pub copy: Buf,
    /// Gradients and moments, when the run trains.
    pub optimizer: Option<OptimizerState>,
    /// Averaged weights, `F32`, when the run keeps them.
    pub ema: Option<Buf>,
    /// Through which moments and averages pass where they lie on the host.
    moments_ring: Option<Ring>,
    ema_ring: Option<Ring>,
    keys: Buf,
    specs: Vec<ParamSpec>,
    offsets: Vec<usize>,
    order: Vec<usize>,
    decayed: usize,
}

impl ParamSet {
    /// Compute copy of a parameter.
    pub fn copy_of(&self, id: ParamId) -> Buf {
        self.slice(self.copy, id)
    }
    /// Gradient of a parameter.
    ///
    /// # Panics
    /// If the set was reserved without an optimizer.
    pub fn grad_of(&self, id: ParamId) -> Buf {
        self.slice(self.state().grad, id)
    }
    /// Optimizer state.
    ///
    /// # Panics
    /// If the set was reserved without an optimizer.
    pub fn state(&self) -> OptimizerState {
        self.optimizer.expect("this run was planned without an optimizer")
    }
    /// The flat arrays that a checkpoint holds, by the prefix of their tensors' names.
    pub fn flats(&self) -> Vec<(&'static str, Flat)> {
        let mut flats = vec![("weight", Flat::Values(self.master))];
        match self.optimizer.map(|state| state.moments) {
            Some(Moments::Full { m, v }) => {
                flats.extend([("adam_m", Flat::Values(m)), ("adam_v", Flat::Values(v))]);
            }
            Some(Moments::Coded { m, v }) => {
                flats.push(("adam_m", Flat::Coded(m, Moment::First)));
                flats.push(("adam_v", Flat::Coded(v, Moment::Second)));
            }
            None => {}
        }
        flats.extend(self.ema.map(|ema| ("ema", Flat::Values(ema))));
        flats
    }
    /// Every parameter, in the order they were added.
    pub fn specs(&self) -> impl Iterator<Item = (ParamId, &ParamSpec)> {
        self.specs.iter().enumerate().map(|(i, spec)| (ParamId(i), spec))
    }
    /// Waits, then copies a parameter's part of a flat array to the host.
    pub fn read(&self, engine: &mut dyn Engine, flat: Flat, id: ParamId) -> Result<Vec<f32>, EngineError> {
        match flat {
            Flat::Values(flat) => engine.read_f32(self.slice(flat, id)),
            Flat::Coded(flat, moment) => {
                let Coded { codes, scales } = self.coded_slice(flat, id);
                let codes = codes_of(&engine.read_i32(codes)?);
                let mut values = eight_bits::decode(moment, &codes, &engine.read_f32(scales)?);
                values.truncate(self.specs[id.0].len());
                Ok(values)
            }
        }
    }
    /// Copies values from the host to a parameter's part of a flat array.
    pub fn write(
        &self,
        engine: &mut dyn Engine,
        flat: Flat,
        id: ParamId,
        values: &[f32],
    ) -> Result<(), EngineError> {
        match flat {
            Flat::Values(flat) => engine.write_f32(self.slice(flat, id), values),
            Flat::Coded(flat, moment) => {
                let to = self.coded_slice(flat, id);
                let mut padded = values.to_vec();
                padded.resize(to.codes.len() * 4, 0.0);
                let (codes, scales) = eight_bits::encode(moment, &padded);
                engine.write_i32(to.codes, &words_of(&codes))?;
                engine.write_f32(to.scales, &scales)
            }
        }
    }
    fn coded_slice(&self, flat: Coded, id: ParamId) -> Coded {
        flat.slice(self.offsets[id.0], self.specs[id.0].len().next_multiple_of(PARAM_ALIGN))
    }
    fn slice(&self, flat: Buf, id: ParamId) -> Buf {
        flat.slice(self.offsets[id.0], self.specs[id.0].len())
    }
    /// `(spec, slice of a flat buffer)` for every parameter, in the order they were added.
    pub fn slices(&self, flat: Buf) -> impl Iterator<Item = (&ParamSpec, Buf)> {
        self.specs.iter().enumerate().map(move |(i, spec)| (spec, self.slice(flat, ParamId(i))))
    }
    /// Elements of the flat buffers that weight decay applies to: `0..decayed`.
    pub fn decayed(&self) -> usize {
        self.decayed
    }
    /// Name of the tensor with this number in [`OptimizerState::segments`].
    pub fn segment_name(&self, segment: usize) -> &str {
        &self.specs[self.order[segment]].name
    }
    /// Writes initial values, the compute copy, zero moments and the segment table. The values depend on `seed`,
    /// `purpose` and a tensor's place in the model alone.
    pub fn initialise(
        &self,
        engine: &mut dyn Engine,
        seed: u64,
        purpose: Purpose,
    ) -> Result<(), EngineError> {
        for (i, spec) in self.specs.iter().enumerate() {
            let dst = self.slice(self.master, ParamId(i));
            match spec.init {
                Init::Normal(std) if std != 0.0 => {
                    let key = rng::key(seed, purpose, i as u64);
                    engine.write_i32(self.keys, &key.map(|k| k as i32))?;
                    engine.normal(self.keys, dst);
                    engine.axpy(std - 1.0, dst, dst);
                }
                Init::Normal(_) => engine.fill(dst, 0.0),
                Init::Constant(value) => engine.fill(dst, value),
            }
        }
        if let Some(state) = self.optimizer {
            let bufs = match state.moments {
                Moments::Full { m, v } => vec![m, v],
                Moments::Coded { m, v } => vec![m.codes, m.scales, v.codes, v.scales],
            };
            bufs.into_iter().for_each(|buf| engine.fill(buf, 0.0));
        }
        self.restart_averages(engine);
        self.refresh(engine)
    }
    /// Makes the averaged weights, where the run keeps them, the present ones.
    pub fn restart_averages(&self, engine: &mut dyn Engine) {
        match self.ema {
            Some(ema) if ema.space() == Space::Host => {
                let copied = engine.offload(self.master, ema);
                engine.after(&copied);
            }
            Some(ema) => engine.copy(self.master, ema),
            None => {}
        }
    }
    /// Calls `work` with the moments of the elements in `range`: all at once or, where they lie on the host, chunk by chunk
    /// as they pass through the device.
    ///
    /// # Panics
    /// If the set was reserved without an optimizer.
    pub fn with_moments(&self, engine: &mut dyn Engine, range: Range<usize>, work: &mut Update<'_>) {
        match (self.state().moments, &self.moments_ring) {
            (Moments::Full { m, v }, Some(ring)) => {
                ring.pass(engine, &[m, v], range, true, &mut |engine, at, staged| {
                    work(engine, at, Moments::Full { m: staged[0], v: staged[1] });
                });
            }
            (moments, _) => work(engine, range.clone(), moments.slice(range.start, range.len())),
        }
    }
    /// Averages the weights of a step in. Where the averages lie on the host that runs beside what follows: the weights
    /// must not be written before it is done.
    pub fn average(&self, engine: &mut dyn Engine, decay: f32) -> Done {
        match (self.ema, &self.ema_ring) {
            (Some(ema), Some(ring)) => engine.beside(&mut |engine| {
                ring.pass(engine, &[ema], 0..ema.len(), true, &mut |engine, at, staged| {
                    engine.ema(decay, self.master.slice(at.start, at.len()), staged[0]);
                });
            }),
            (Some(ema), None) => {
                engine.ema(decay, self.master, ema);
                Done::default()
            }
            (None, _) => Done::default(),
        }
    }
    /// Puts the averaged weights, where the run keeps them, in place of the compute copy.
    pub fn copy_averages(&self, engine: &mut dyn Engine) {
        match (self.ema, &self.ema_ring) {
            (Some(ema), Some(ring)) => {
                ring.pass(engine, &[ema], 0..ema.len(), false, &mut |engine, at, staged| {
                    engine.copy(staged[0], self.copy.slice(at.start, at.len()));
                });
            }
            (Some(ema), None) => engine.copy(ema, self.copy),
            (None, _) => {}
        }
    }
    /// Rewrites what follows from the master weights and from the layout: compute copy and segment table. Needed
    /// after a checkpoint was loaded.
    pub fn refresh(&self, engine: &mut dyn Engine) -> Result<(), EngineError> {
        engine.copy(self.master, self.copy);
        if let Some(state) = self.optimizer {
            let mut table: Vec<i32> =
                self.order.iter().map(|&i| (self.offsets[i] / PARAM_ALIGN) as i32).collect();
            table.push((self.master.len() / PARAM_ALIGN) as i32);
            engine.write_i32(state.segments, &table)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Precision;

    #[test]
    fn decayed_tensors_come_first_and_tensors_do_not_overlap() {
        let mut params = ParamPlan::default();
        let bias = params.add("b".into(), &[3], Init::Constant(0.0), false);
        let linear = params.linear("w", 5, 30, 0.1);
        let mut arena = ArenaPlan::new(Precision::Bf16);
        let keeps = Keeps { moments: Some(config::Moments::Device), ema: None };
        let set = params.reserve(&mut arena, "model", keeps);
        assert_eq!(set.decayed(), 256, "150 elements, padded to 128");
        assert_eq!(set.segment_name(0), "w.weight");
        let all: Vec<Buf> = set.slices(set.master).map(|(_, buf)| buf).collect();
        assert!(!all[0].overlaps(&all[1]) && !all[1].overlaps(&all[2]) && !all[0].overlaps(&all[2]));
        assert_eq!(set.copy_of(linear.weight).len(), 150);
        assert_eq!(set.grad_of(bias).offset_bytes() % 256, 0);
        assert_eq!(set.master.len(), 256 + 128 + 128);
    }
}
