//! Parameters: names, shapes, initial values, and their place in flat master, gradient, moment and
//! compute buffers.

use crate::engine::{ArenaPlan, Buf, Done, Dtype, Engine, EngineError, PARAM_ALIGN, Space};
use crate::offload::Ring;
use crate::rng::{self, Purpose};

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
    /// Reserves the flat buffers: decayed tensors first, each at a multiple of [`PARAM_ALIGN`] elements. Averaged weights
    /// are kept where `ema` says.
    pub fn reserve(self, plan: &mut ArenaPlan, label: &str, optimizer: bool, ema: Option<Space>) -> ParamSet {
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
        let flat = |plan: &mut ArenaPlan, what: &str| plan.f32(&format!("{label}/{what}"), end);
        ParamSet {
            master: flat(plan, "master"),
            copy: plan.act(&format!("{label}/compute copy"), end),
            optimizer: optimizer.then(|| OptimizerState {
                grad: flat(plan, "gradients"),
                m: flat(plan, "first moment"),
                v: flat(plan, "second moment"),
                segments: plan.i32(&format!("{label}/segments"), order.len() + 1),
            }),
            ema: ema.map(|space| plan.alloc_in(space, &format!("{label}/averaged weights"), Dtype::F32, end)),
            ema_ring: (ema == Some(Space::Host))
                .then(|| Ring::reserve(plan, "staging/averaged weights", 1, end)),
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

/// Flat buffers an optimizer needs beside the weights.
#[derive(Copy, Clone, Debug)]
pub struct OptimizerState {
    /// Gradients, `F32`.
    pub grad: Buf,
    /// First moment, `F32`.
    pub m: Buf,
    /// Second moment, `F32`.
    pub v: Buf,
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
    /// Through which they pass where they lie on the host.
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
            engine.fill(state.m, 0.0);
            engine.fill(state.v, 0.0);
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
        let set = params.reserve(&mut arena, "model", true, None);
        assert_eq!(set.decayed(), 192, "150 elements, padded to 64");
        assert_eq!(set.segment_name(0), "w.weight");
        let all: Vec<Buf> = set.slices(set.master).map(|(_, buf)| buf).collect();
        assert!(!all[0].overlaps(&all[1]) && !all[1].overlaps(&all[2]) && !all[0].overlaps(&all[2]));
        assert_eq!(set.copy_of(linear.weight).len(), 150);
        assert_eq!(set.grad_of(bias).offset_bytes() % 256, 0);
        assert_eq!(set.master.len(), 192 + 64 + 64);
    }
}
