//! The two stages of a run as an explicit state machine: dense training that teaches predictors and
//! profiles attention, then sparse training. Pure: steps and losses in, stage out.

use crate::config::{Attention, Dsv, Switch};
use serde::{Deserialize, Serialize};

/// Where a run is.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Full attention or windows throughout, without predictors.
    Baseline,
    /// Full attention, predictors learn, attention is profiled.
    Dense,
    /// The dispatcher chooses per block; predictors go on at a lower rate.
    Sparse {
        /// First step of the stage.
        since: u64,
    },
}

impl Stage {
    /// Name for logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Baseline => "baseline",
            Stage::Dense => "stage 1",
            Stage::Sparse { .. } => "stage 2",
        }
    }
    /// Number for metrics: 0, 1 or 2.
    pub fn number(self) -> u8 {
        match self {
            Stage::Baseline => 0,
            Stage::Dense => 1,
            Stage::Sparse { .. } => 2,
        }
    }
}

/// Mean predictor loss below which the paper ends stage 1; told beside every switch.
pub const LOSS_CRITERION: f64 = 0.01;

/// Why stage 1 ended.
#[derive(Copy, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The configured step was reached.
    Step(u64),
    /// The mean predictor loss fell below the configured value.
    Loss {
        /// The loss seen.
        loss: f64,
        /// The value it fell below.
        below: f64,
    },
}

/// The state machine.
#[derive(Copy, Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stages {
    stage: Stage,
    reason: Option<Reason>,
}

impl Stages {
    /// The state before step 0.
    pub fn new(dsv: &Dsv) -> Stages {
        let stage = match dsv.attention {
            Attention::Dsv => Stage::Dense,
            Attention::Fixed => Stage::Sparse { since: 0 },
            Attention::Full | Attention::WaM | Attention::WaL => Stage::Baseline,
        };
        Stages { stage, reason: None }
    }

    /// Current stage.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Why stage 1 ended, once it has.
    pub fn reason(&self) -> Option<Reason> {
        self.reason
    }

    /// To be called before every step. `predictor_loss` is the last mean loss over all blocks and heads, when one
    /// has been read out. Returns the reason on the step that begins stage 2.
    pub fn advance(&mut self, dsv: &Dsv, step: u64, predictor_loss: Option<f64>) -> Option<Reason> {
        if self.stage != Stage::Dense {
            return None;
        }
        let reason = match dsv.switch {
            Switch::Step(at) => (step >= at).then_some(Reason::Step(at)),
            Switch::Loss(below) => {
                predictor_loss.filter(|&loss| loss < below).map(|loss| Reason::Loss { loss, below })
            }
        }?;
        self.stage = Stage::Sparse { since: step };
        self.reason = Some(reason);
        Some(reason)
    }

    /// Whether step `step` profiles the attention.
    pub fn profiles(&self, dsv: &Dsv, step: u64) -> bool {
        match self.stage {
            Stage::Baseline => false,
            Stage::Dense => step.is_multiple_of(dsv.profile_every),
            Stage::Sparse { since } => (step - since).is_multiple_of(dsv.profile_every_stage2),
        }
    }

    /// Whether the dispatcher decides before step `step`.
    pub fn dispatches(&self, dsv: &Dsv, step: u64) -> bool {
        match self.stage {
            Stage::Sparse { since } => (step - since).is_multiple_of(dsv.dispatch_every),
            _ => false,
        }
    }

    /// Learning rate of the predictors.
    pub fn predictor_lr(&self, dsv: &Dsv) -> f64 {
        match self.stage {
            // A fixed share has no stage 1 in which they could have learnt.
            Stage::Sparse { .. } if dsv.attention != Attention::Fixed => {
                dsv.predictor_lr * dsv.predictor_lr_stage2_factor
            }
            _ => dsv.predictor_lr,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn dsv() -> Dsv {
        let mut dsv = Config::preset("tiny").unwrap().dsv;
        (dsv.profile_every, dsv.profile_every_stage2, dsv.dispatch_every) = (5, 7, 3);
        dsv
    }

    #[test]
    fn a_step_ends_stage_one_once() {
        let dsv = Dsv { switch: Switch::Step(4), ..dsv() };
        let mut s = Stages::new(&dsv);
        assert!((0..4).all(|step| s.advance(&dsv, step, Some(0.0)).is_none()));
        assert_eq!(s.stage(), Stage::Dense);
        assert_eq!(s.advance(&dsv, 4, None), Some(Reason::Step(4)));
        assert_eq!(s.stage(), Stage::Sparse { since: 4 });
        assert_eq!(s.advance(&dsv, 5, None), None);
        assert_eq!(s.reason(), Some(Reason::Step(4)));
    }

    #[test]
    fn a_resumed_run_past_the_step_switches_at_once() {
        let dsv = Dsv { switch: Switch::Step(4), ..dsv() };
        let mut s = Stages::new(&dsv);
        assert!(s.advance(&dsv, 9, None).is_some());
        assert_eq!(s.stage(), Stage::Sparse { since: 9 });
    }

    #[test]
    fn a_loss_ends_stage_one_when_it_has_been_seen_below() {
        let dsv = Dsv { switch: Switch::Loss(0.01), ..dsv() };
        let mut s = Stages::new(&dsv);
        assert_eq!(s.advance(&dsv, 0, None), None);
        assert_eq!(s.advance(&dsv, 1, Some(0.01)), None);
        assert_eq!(s.advance(&dsv, 2, Some(f64::NAN)), None);
        let reason = Some(Reason::Loss { loss: 0.0099, below: 0.01 });
        assert_eq!(s.advance(&dsv, 3, Some(0.0099)), reason);
    }

    #[test]
    fn the_baseline_never_switches_profiles_or_dispatches() {
        for attention in [Attention::Full, Attention::WaM, Attention::WaL] {
            let dsv = Dsv { attention, switch: Switch::Step(0), ..dsv() };
            let mut s = Stages::new(&dsv);
            for step in 0..20 {
                assert!(s.advance(&dsv, step, Some(0.0)).is_none());
                assert!(!s.profiles(&dsv, step) && !s.dispatches(&dsv, step));
            }
        }
    }

    #[test]
    fn a_fixed_share_is_stage_two_from_the_first_step_on() {
        let dsv = Dsv { attention: Attention::Fixed, switch: Switch::Step(5), ..dsv() };
        let mut s = Stages::new(&dsv);
        assert!((0..20).all(|step| s.advance(&dsv, step, Some(0.0)).is_none()));
        assert_eq!(s.stage(), Stage::Sparse { since: 0 });
        assert!(s.dispatches(&dsv, 0) && s.profiles(&dsv, 0) && !s.profiles(&dsv, 6) && s.profiles(&dsv, 7));
        assert_eq!(s.predictor_lr(&dsv), dsv.predictor_lr);
    }

    #[test]
    fn profiles_and_decisions_fall_on_fixed_steps() {
        let dsv = Dsv { switch: Switch::Step(11), ..dsv() };
        let mut s = Stages::new(&dsv);
        let (mut profiles, mut decisions) = (vec![], vec![]);
        for step in 0..22 {
            s.advance(&dsv, step, None);
            if s.profiles(&dsv, step) {
                profiles.push(step);
            }
            if s.dispatches(&dsv, step) {
                decisions.push(step);
            }
        }
        assert_eq!(profiles, [0, 5, 10, 11, 18]);
        assert_eq!(decisions, [11, 14, 17, 20]);
        assert!((s.predictor_lr(&dsv) / dsv.predictor_lr - dsv.predictor_lr_stage2_factor).abs() < 1e-12);
    }
}
