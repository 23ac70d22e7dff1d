//! Registers of a warp and the instructions that touch nothing else.

use crate::decode::{Arith, Compare, Kernel, Logic, NONE, Round, Ty};
use crate::float::{bf16_of, bf16_to, bits_of, exp2, f16_of, f16_to, log2, max, max_nan, min, min_nan};
use std::collections::VecDeque;

pub(crate) const LANES: usize = 32;
pub(crate) const FULL: u32 = u32::MAX;

/// What lanes that go their own way wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    Nothing,
    /// The phase of a barrier in shared memory: its address, the parity that has to end.
    Phase {
        cta: u32,
        address: u32,
        parity: u32,
    },
    /// A named barrier, and how often it had completed.
    Barrier {
        id: u32,
        round: u64,
        red: u32,
        word: bool,
    },
    /// These lanes, at the same instruction.
    Lanes(u32),
    /// The cluster's barrier, and how often it had completed.
    Cluster {
        round: u64,
    },
}

/// Lanes at one place of the program.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fragment {
    pub(crate) pc: u32,
    pub(crate) mask: u32,
    pub(crate) wait: Wait,
    /// It asked to let others run.
    pub(crate) yielded: bool,
}

/// A wgmma between its issue and the wait that covers it.
#[derive(Debug)]
pub(crate) struct Issued {
    pub(crate) pc: u32,
    pub(crate) group: u64,
    pub(crate) done: bool,
    pub(crate) descriptors: [u64; 2],
    pub(crate) accumulate: bool,
    /// Accumulators that a register move took along: which, where to.
    pub(crate) copies: Vec<(u32, u32)>,
}

pub(crate) struct Warp {
    pub(crate) id: u32,
    pub(crate) words: Vec<[u32; LANES]>,
    pub(crate) doubles: Vec<[u64; LANES]>,
    pub(crate) predicates: Vec<u32>,
    pub(crate) fragments: Vec<Fragment>,
    /// Lanes that have not ended.
    pub(crate) live: u32,
    pub(crate) local: Vec<u8>,
    pub(crate) issued: VecDeque<Issued>,
    pub(crate) group: u64,
    /// By word: wgmmas in flight that it is an accumulator of, and those that read it.
    pub(crate) accumulating: Vec<u16>,
    pub(crate) feeding: Vec<u16>,
    /// How often the cluster's barrier had completed when this warp arrived.
    pub(crate) cluster_round: u64,
    /// The allocation last used.
    pub(crate) region: (u64, u64, bool),
}

impl Warp {
    pub(crate) fn new(id: u32, kernel: &Kernel) -> Warp {
        let words = kernel.words as usize;
        let in_flight = if kernel.uses_wgmma { words } else { 0 };
        Warp {
            id,
            words: vec![[0; LANES]; words],
            doubles: vec![[0; LANES]; kernel.doubles as usize],
            predicates: vec![0; kernel.predicates as usize],
            fragments: Vec::new(),
            live: 0,
            local: vec![0xFF; LANES * kernel.local_bytes as usize],
            issued: VecDeque::new(),
            group: 0,
            accumulating: vec![0; in_flight],
            feeding: vec![0; in_flight],
            cluster_round: 0,
            region: (0, 0, false),
        }
    }

    #[inline(always)]
    pub(crate) fn word(&self, index: u32) -> &[u32; LANES] {
        debug_assert!((index as usize) < self.words.len());
        // SAFETY: the decoder numbered the registers, and there are as many.
        unsafe { self.words.get_unchecked(index as usize) }
    }

    #[inline(always)]
    pub(crate) fn double(&self, index: u32) -> &[u64; LANES] {
        debug_assert!((index as usize) < self.doubles.len());
        // SAFETY: as above.
        unsafe { self.doubles.get_unchecked(index as usize) }
    }

    #[inline(always)]
    pub(crate) fn predicate(&self, index: u32) -> u32 {
        self.predicates[index as usize]
    }

    #[inline(always)]
    pub(crate) fn set_word(&mut self, index: u32, values: &[u32; LANES], mask: u32) {
        if index != NONE {
            write_lanes(&mut self.words[index as usize], values, mask);
        }
    }

    #[inline(always)]
    pub(crate) fn set_double(&mut self, index: u32, values: &[u64; LANES], mask: u32) {
        if index != NONE {
            write_lanes(&mut self.doubles[index as usize], values, mask);
        }
    }

    #[inline(always)]
    pub(crate) fn set_predicate(&mut self, index: u32, value: u32, mask: u32) {
        if index != NONE {
            let to = &mut self.predicates[index as usize];
            *to = *to & !mask | value & mask;
        }
    }

    /// One arithmetic instruction. `d` holds `a` op `b` in the lanes of `mask`.
    #[inline(always)]
    pub(crate) fn alu(&mut self, f: Arith, d: u32, a: u32, b: u32, c: u32, extra: u32, mask: u32) {
        macro_rules! map {
            ($to:ident, $kind:ty, ($($x:ident = $from:ident $r:ident),*), $e:expr) => {{
                $(let $x = *self.$from($r);)*
                let mut out = [0 as $kind; LANES];
                for lane in 0..LANES {
                    $(let $x = $x[lane];)*
                    out[lane] = $e;
                }
                self.$to(d, &out, mask);
            }};
        }
        macro_rules! w1 { (|$x:ident| $e:expr) => { map!(set_word, u32, ($x = word a), $e) } }
        macro_rules! w2 { (|$x:ident, $y:ident| $e:expr) => { map!(set_word, u32, ($x = word a, $y = word b), $e) } }
        macro_rules! w3 { (|$x:ident, $y:ident, $z:ident| $e:expr) => {
            map!(set_word, u32, ($x = word a, $y = word b, $z = word c), $e) } }
        macro_rules! f1 {
            (|$x:ident| $e:expr) => {
                w1!(|p| {
                    let $x = f32::from_bits(p);
                    let y: f32 = $e;
                    bits_of(y)
                })
            };
        }
        macro_rules! f2 {
            (|$x:ident, $y:ident| $e:expr) => {
                w2!(|p, q| {
                    let ($x, $y) = (f32::from_bits(p), f32::from_bits(q));
                    let z: f32 = $e;
                    bits_of(z)
                })
            };
        }
        macro_rules! d1 { (|$x:ident| $e:expr) => { map!(set_double, u64, ($x = double a), $e) } }
        macro_rules! d2 { (|$x:ident, $y:ident| $e:expr) => { map!(set_double, u64, ($x = double a, $y = double b), $e) } }
        macro_rules! g1 {
            (|$x:ident| $e:expr) => {
                d1!(|p| {
                    let $x = f64::from_bits(p);
                    let y: f64 = $e;
                    y.to_bits()
                })
            };
        }
        macro_rules! g2 {
            (|$x:ident, $y:ident| $e:expr) => {
                d2!(|p, q| {
                    let ($x, $y) = (f64::from_bits(p), f64::from_bits(q));
                    let z: f64 = $e;
                    z.to_bits()
                })
            };
        }
        // Two halves a word.
        macro_rules! p2 {
            ($to:ident, $of:ident, |$x:ident, $y:ident| $e:expr) => {
                w2!(|p, q| {
                    let low = {
                        let ($x, $y) = ($to(p & 0xFFFF), $to(q & 0xFFFF));
                        $of($e)
                    };
                    let high = {
                        let ($x, $y) = ($to(p >> 16), $to(q >> 16));
                        $of($e)
                    };
                    low | high << 16
                })
            };
        }
        macro_rules! p3 {
            ($to:ident, $of:ident) => {
                w3!(|p, q, r| {
                    let low = $of($to(p & 0xFFFF).mul_add($to(q & 0xFFFF), $to(r & 0xFFFF)));
                    let high = $of($to(p >> 16).mul_add($to(q >> 16), $to(r >> 16)));
                    low | high << 16
                })
            };
        }
        match f {
            Arith::MovW => w1!(|x| x),
            Arith::NotW => w1!(|x| !x),
            Arith::NegW => w1!(|x| x.wrapping_neg()),
            Arith::AbsW => w1!(|x| (x as i32).wrapping_abs() as u32),
            Arith::Cnot => w1!(|x| (x == 0) as u32),
            Arith::Popc => w1!(|x| x.count_ones()),
            Arith::Clz => w1!(|x| x.leading_zeros()),
            Arith::Brev => w1!(|x| x.reverse_bits()),
            Arith::BfindU => w1!(|x| if x == 0 { FULL } else { 31 - x.leading_zeros() }),
            Arith::BfindShiftU => w1!(|x| if x == 0 { FULL } else { x.leading_zeros() }),
            Arith::BfindS => w1!(|x| {
                let x = if (x as i32) < 0 { !x } else { x };
                if x == 0 { FULL } else { 31 - x.leading_zeros() }
            }),
            Arith::FNeg => w1!(|x| x ^ 1 << 31),
            Arith::FAbs => w1!(|x| x & !(1 << 31)),
            Arith::Ex2 => f1!(|x| exp2(x)),
            Arith::Lg2 => f1!(|x| log2(x)),
            Arith::Rcp => f1!(|x| 1.0 / x),
            Arith::Sqrt => f1!(|x| x.sqrt()),
            Arith::Rsqrt => f1!(|x| 1.0 / x.sqrt()),
            Arith::Sin => f1!(|x| x.sin()),
            Arith::Cos => f1!(|x| x.cos()),
            Arith::Tanh => f1!(|x| x.tanh()),
            Arith::AddW => w2!(|x, y| x.wrapping_add(y)),
            Arith::SubW => w2!(|x, y| x.wrapping_sub(y)),
            Arith::MulW => w2!(|x, y| x.wrapping_mul(y)),
            Arith::MulHiU => w2!(|x, y| ((x as u64 * y as u64) >> 32) as u32),
            Arith::MulHiS => w2!(|x, y| ((x as i32 as i64 * y as i32 as i64) >> 32) as u32),
            Arith::AndW => w2!(|x, y| x & y),
            Arith::OrW => w2!(|x, y| x | y),
            Arith::XorW => w2!(|x, y| x ^ y),
            Arith::ShlW => w2!(|x, y| if y > 31 { 0 } else { x << y }),
            Arith::ShrU => w2!(|x, y| if y > 31 { 0 } else { x >> y }),
            Arith::ShrS => w2!(|x, y| (x as i32 >> y.min(31)) as u32),
            Arith::MinU => w2!(|x, y| x.min(y)),
            Arith::MaxU => w2!(|x, y| x.max(y)),
            Arith::MinS => w2!(|x, y| (x as i32).min(y as i32) as u32),
            Arith::MaxS => w2!(|x, y| (x as i32).max(y as i32) as u32),
            Arith::DivU => w2!(|x, y| x.checked_div(y).unwrap_or(FULL)),
            Arith::DivS => w2!(|x, y| if y == 0 { FULL } else { (x as i32).wrapping_div(y as i32) as u32 }),
            Arith::RemU => w2!(|x, y| x.checked_rem(y).unwrap_or(x)),
            Arith::RemS => w2!(|x, y| if y == 0 { x } else { (x as i32).wrapping_rem(y as i32) as u32 }),
            Arith::FAdd => f2!(|x, y| x + y),
            Arith::FSub => f2!(|x, y| x - y),
            Arith::FMul => f2!(|x, y| x * y),
            Arith::FMin => f2!(|x, y| min(x, y)),
            Arith::FMax => f2!(|x, y| max(x, y)),
            Arith::FMinNan => f2!(|x, y| min_nan(x, y)),
            Arith::FMaxNan => f2!(|x, y| max_nan(x, y)),
            Arith::FDiv => f2!(|x, y| x / y),
            Arith::FCopysign => f2!(|x, y| y.copysign(x)),
            Arith::MadW => w3!(|x, y, z| x.wrapping_mul(y).wrapping_add(z)),
            Arith::FFma => {
                w3!(|x, y, z| bits_of(f32::from_bits(x).mul_add(f32::from_bits(y), f32::from_bits(z))))
            }
            Arith::Sad => w3!(|x, y, z| x.abs_diff(y).wrapping_add(z)),
            Arith::ShfLWrap => w3!(|x, y, z| ((((y as u64) << 32 | x as u64) << (z & 31)) >> 32) as u32),
            Arith::ShfRWrap => w3!(|x, y, z| (((y as u64) << 32 | x as u64) >> (z & 31)) as u32),
            Arith::ShfLClamp => w3!(|x, y, z| ((((y as u64) << 32 | x as u64) << z.min(32)) >> 32) as u32),
            Arith::ShfRClamp => w3!(|x, y, z| (((y as u64) << 32 | x as u64) >> z.min(32)) as u32),
            Arith::Prmt => w3!(|x, y, z| {
                let both = (y as u64) << 32 | x as u64;
                let mut out = 0;
                for i in 0..4 {
                    let s = z >> (4 * i) & 0xF;
                    let byte = (both >> (8 * (s & 7))) as u32 & 0xFF;
                    let byte = if s & 8 != 0 { if byte & 0x80 != 0 { 0xFF } else { 0 } } else { byte };
                    out |= byte << (8 * i);
                }
                out
            }),
            Arith::BfeU => w3!(|x, y, z| {
                let (at, len) = (y & 0xFF, z & 0xFF);
                let moved = if at > 31 { 0 } else { x >> at };
                if len > 31 { moved } else { moved & ((1 << len) - 1) }
            }),
            Arith::BfeS => w3!(|x, y, z| {
                let (at, len) = ((y & 0xFF).min(31), (z & 0xFF).min(32));
                if len == 0 {
                    0
                } else {
                    let top = (at + len - 1).min(31);
                    let moved = ((x << (31 - top)) as i32 >> (31 - top)) >> at;
                    moved as u32
                }
            }),
            Arith::Bfi => {
                let (x, y, z, n) = (*self.word(a), *self.word(b), *self.word(c), *self.word(extra));
                let out = std::array::from_fn(|l| {
                    let (at, len) = (z[l] & 0xFF, n[l] & 0xFF);
                    if at > 31 || len == 0 {
                        return y[l];
                    }
                    let ones = if len > 31 { FULL } else { (1 << len) - 1 };
                    y[l] & !(ones << at) | (x[l] & ones) << at
                });
                self.set_word(d, &out, mask);
            }
            Arith::BfiD => {
                let (x, y, z, n) = (*self.double(a), *self.double(b), *self.word(c), *self.word(extra));
                let out = std::array::from_fn(|l| {
                    let (at, len) = (z[l] & 0xFF, n[l] & 0xFF);
                    if at > 63 || len == 0 {
                        return y[l];
                    }
                    let ones = if len > 63 { u64::MAX } else { (1 << len) - 1 };
                    y[l] & !(ones << at) | (x[l] & ones) << at
                });
                self.set_double(d, &out, mask);
            }
            Arith::Lop3 => {
                let (x, y, z) = (*self.word(a), *self.word(b), *self.word(c));
                let table = self.word(extra)[0];
                let out = std::array::from_fn(|l| {
                    let mut value = 0;
                    for i in 0..8 {
                        if table >> i & 1 != 0 {
                            let pick = |word: u32, bit: u32| if i >> bit & 1 != 0 { word } else { !word };
                            value |= pick(x[l], 2) & pick(y[l], 1) & pick(z[l], 0);
                        }
                    }
                    value
                });
                self.set_word(d, &out, mask);
            }
            Arith::PackBf16 => w2!(|x, y| bf16_of(f32::from_bits(x)) << 16 | bf16_of(f32::from_bits(y))),
            Arith::PackBf16Relu => w2!(|x, y| {
                bf16_of(max(f32::from_bits(x), 0.0)) << 16 | bf16_of(max(f32::from_bits(y), 0.0))
            }),
            Arith::PackF16 => w2!(|x, y| f16_of(f32::from_bits(x)) << 16 | f16_of(f32::from_bits(y))),
            Arith::AddH => w2!(|x, y| x.wrapping_add(y) & 0xFFFF),
            Arith::SubH => w2!(|x, y| x.wrapping_sub(y) & 0xFFFF),
            Arith::MulH => w2!(|x, y| x.wrapping_mul(y) & 0xFFFF),
            Arith::AndH => w2!(|x, y| x & y & 0xFFFF),
            Arith::OrH => w2!(|x, y| (x | y) & 0xFFFF),
            Arith::XorH => w2!(|x, y| (x ^ y) & 0xFFFF),
            Arith::NotH => w1!(|x| !x & 0xFFFF),
            Arith::NegH => w1!(|x| x.wrapping_neg() & 0xFFFF),
            Arith::ShlH => w2!(|x, y| if y > 15 { 0 } else { x << y & 0xFFFF }),
            Arith::ShrHu => w2!(|x, y| if y > 15 { 0 } else { (x & 0xFFFF) >> y }),
            Arith::ShrHs => w2!(|x, y| (x as i16 >> y.min(15)) as u16 as u32),
            Arith::MinHs => w2!(|x, y| (x as i16).min(y as i16) as u16 as u32),
            Arith::MaxHs => w2!(|x, y| (x as i16).max(y as i16) as u16 as u32),
            Arith::MinHu => w2!(|x, y| (x as u16).min(y as u16) as u32),
            Arith::MaxHu => w2!(|x, y| (x as u16).max(y as u16) as u32),
            Arith::AddBf2 => p2!(bf16_to, bf16_of, |x, y| x + y),
            Arith::SubBf2 => p2!(bf16_to, bf16_of, |x, y| x - y),
            Arith::MulBf2 => p2!(bf16_to, bf16_of, |x, y| x * y),
            Arith::MaxBf2 => p2!(bf16_to, bf16_of, |x, y| max(x, y)),
            Arith::MinBf2 => p2!(bf16_to, bf16_of, |x, y| min(x, y)),
            Arith::FmaBf2 => p3!(bf16_to, bf16_of),
            Arith::AddHf2 => p2!(f16_to, f16_of, |x, y| x + y),
            Arith::SubHf2 => p2!(f16_to, f16_of, |x, y| x - y),
            Arith::MulHf2 => p2!(f16_to, f16_of, |x, y| x * y),
            Arith::MaxHf2 => p2!(f16_to, f16_of, |x, y| max(x, y)),
            Arith::MinHf2 => p2!(f16_to, f16_of, |x, y| min(x, y)),
            Arith::FmaHf2 => p3!(f16_to, f16_of),
            Arith::PackHW => w2!(|x, y| x & 0xFFFF | y << 16),
            Arith::UnpackHW => {
                let x = *self.word(a);
                self.set_word(d, &x.map(|x| x & 0xFFFF), mask);
                self.set_word(b, &x.map(|x| x >> 16), mask);
            }
            Arith::PackWD => map!(set_double, u64, (x = word a, y = word b), x as u64 | (y as u64) << 32),
            Arith::UnpackWD => {
                let x = *self.double(a);
                self.set_word(d, &x.map(|x| x as u32), mask);
                self.set_word(b, &x.map(|x| (x >> 32) as u32), mask);
            }
            Arith::MovD => d1!(|x| x),
            Arith::NotD => d1!(|x| !x),
            Arith::NegD => d1!(|x| x.wrapping_neg()),
            Arith::BrevD => d1!(|x| x.reverse_bits()),
            Arith::AddD => d2!(|x, y| x.wrapping_add(y)),
            Arith::SubD => d2!(|x, y| x.wrapping_sub(y)),
            Arith::MulD => d2!(|x, y| x.wrapping_mul(y)),
            Arith::MulHiUD => d2!(|x, y| ((x as u128 * y as u128) >> 64) as u64),
            Arith::MulHiSD => d2!(|x, y| ((x as i64 as i128 * y as i64 as i128) >> 64) as u64),
            Arith::AndD => d2!(|x, y| x & y),
            Arith::OrD => d2!(|x, y| x | y),
            Arith::XorD => d2!(|x, y| x ^ y),
            Arith::ShlD => map!(set_double, u64, (x = double a, y = word b), if y > 63 { 0 } else { x << y }),
            Arith::ShrUD => {
                map!(set_double, u64, (x = double a, y = word b), if y > 63 { 0 } else { x >> y })
            }
            Arith::ShrSD => map!(set_double, u64, (x = double a, y = word b), (x as i64 >> y.min(63)) as u64),
            Arith::MinUD => d2!(|x, y| x.min(y)),
            Arith::MaxUD => d2!(|x, y| x.max(y)),
            Arith::MinSD => d2!(|x, y| (x as i64).min(y as i64) as u64),
            Arith::MaxSD => d2!(|x, y| (x as i64).max(y as i64) as u64),
            Arith::DivUD => d2!(|x, y| x.checked_div(y).unwrap_or(u64::MAX)),
            Arith::DivSD => {
                d2!(|x, y| if y == 0 { u64::MAX } else { (x as i64).wrapping_div(y as i64) as u64 })
            }
            Arith::RemUD => d2!(|x, y| x.checked_rem(y).unwrap_or(x)),
            Arith::RemSD => d2!(|x, y| if y == 0 { x } else { (x as i64).wrapping_rem(y as i64) as u64 }),
            Arith::MadD => {
                map!(set_double, u64, (x = double a, y = double b, z = double c), x.wrapping_mul(y).wrapping_add(z))
            }
            Arith::DAdd => g2!(|x, y| x + y),
            Arith::DSub => g2!(|x, y| x - y),
            Arith::DMul => g2!(|x, y| x * y),
            Arith::DDiv => g2!(|x, y| x / y),
            Arith::DMin => g2!(|x, y| x.min(y)),
            Arith::DMax => g2!(|x, y| x.max(y)),
            Arith::DFma => map!(
                set_double,
                u64,
                (x = double a, y = double b, z = double c),
                f64::from_bits(x).mul_add(f64::from_bits(y), f64::from_bits(z)).to_bits()
            ),
            Arith::DNeg => g1!(|x| -x),
            Arith::DAbs => g1!(|x| x.abs()),
            Arith::DSqrt => g1!(|x| x.sqrt()),
            Arith::PopcD => map!(set_word, u32, (x = double a), x.count_ones()),
            Arith::ClzD => map!(set_word, u32, (x = double a), x.leading_zeros()),
            Arith::MulWideU => map!(set_double, u64, (x = word a, y = word b), x as u64 * y as u64),
            Arith::MulWideS => {
                map!(set_double, u64, (x = word a, y = word b), (x as i32 as i64 * y as i32 as i64) as u64)
            }
            Arith::MadWideU => map!(
                set_double,
                u64,
                (x = word a, y = word b, z = double c),
                (x as u64 * y as u64).wrapping_add(z)
            ),
            Arith::MadWideS => map!(
                set_double,
                u64,
                (x = word a, y = word b, z = double c),
                ((x as i32 as i64 * y as i32 as i64) as u64).wrapping_add(z)
            ),
            Arith::MulWideHu => w2!(|x, y| (x & 0xFFFF) * (y & 0xFFFF)),
            Arith::MulWideHs => w2!(|x, y| (x as i16 as i32 * y as i16 as i32) as u32),
            Arith::SelW => {
                let (x, y, p) = (*self.word(a), *self.word(b), self.predicate(c));
                let out = std::array::from_fn(|l| if p >> l & 1 != 0 { x[l] } else { y[l] });
                self.set_word(d, &out, mask);
            }
            Arith::SelD => {
                let (x, y, p) = (*self.double(a), *self.double(b), self.predicate(c));
                let out = std::array::from_fn(|l| if p >> l & 1 != 0 { x[l] } else { y[l] });
                self.set_double(d, &out, mask);
            }
            Arith::MovP => self.set_predicate(d, self.predicate(a), mask),
            Arith::NotP => self.set_predicate(d, !self.predicate(a), mask),
            Arith::AndP => self.set_predicate(d, self.predicate(a) & self.predicate(b), mask),
            Arith::OrP => self.set_predicate(d, self.predicate(a) | self.predicate(b), mask),
            Arith::XorP => self.set_predicate(d, self.predicate(a) ^ self.predicate(b), mask),
        }
    }

    #[allow(clippy::too_many_arguments)]
    #[inline(always)]
    pub(crate) fn setp(
        &mut self,
        ty: Ty,
        compare: Compare,
        (d, q): (u32, u32),
        (a, b): (u32, u32),
        logic: Logic,
        (c, c_not): (u32, bool),
        mask: u32,
    ) {
        macro_rules! lanes {
            ($from:ident, |$x:ident, $y:ident| $e:expr) => {{
                let (x, y) = (*self.$from(a), *self.$from(b));
                let mut out = 0u32;
                for lane in 0..LANES {
                    let ($x, $y) = (x[lane], y[lane]);
                    out |= ($e as u32) << lane;
                }
                out
            }};
        }
        macro_rules! ordered {
            ($from:ident, $kind:ty, |$x:ident| $cast:expr) => {
                match compare {
                    Compare::Eq => lanes!($from, |x, y| {
                        let p: $kind = {
                            let $x = x;
                            $cast
                        };
                        let q: $kind = {
                            let $x = y;
                            $cast
                        };
                        p == q
                    }),
                    Compare::Ne => lanes!($from, |x, y| {
                        let p: $kind = {
                            let $x = x;
                            $cast
                        };
                        let q: $kind = {
                            let $x = y;
                            $cast
                        };
                        p != q
                    }),
                    Compare::Lt => lanes!($from, |x, y| {
                        let p: $kind = {
                            let $x = x;
                            $cast
                        };
                        let q: $kind = {
                            let $x = y;
                            $cast
                        };
                        p < q
                    }),
                    Compare::Le => lanes!($from, |x, y| {
                        let p: $kind = {
                            let $x = x;
                            $cast
                        };
                        let q: $kind = {
                            let $x = y;
                            $cast
                        };
                        p <= q
                    }),
                    Compare::Gt => lanes!($from, |x, y| {
                        let p: $kind = {
                            let $x = x;
                            $cast
                        };
                        let q: $kind = {
                            let $x = y;
                            $cast
                        };
                        p > q
                    }),
                    _ => lanes!($from, |x, y| {
                        let p: $kind = {
                            let $x = x;
                            $cast
                        };
                        let q: $kind = {
                            let $x = y;
                            $cast
                        };
                        p >= q
                    }),
                }
            };
        }
        macro_rules! floats {
            ($from:ident, |$x:ident| $cast:expr) => {
                lanes!($from, |x, y| {
                    let p = {
                        let $x = x;
                        $cast
                    };
                    let q = {
                        let $x = y;
                        $cast
                    };
                    let nan = p.is_nan() || q.is_nan();
                    match compare {
                        Compare::Eq => p == q,
                        Compare::Ne => p != q && !nan,
                        Compare::Lt => p < q,
                        Compare::Le => p <= q,
                        Compare::Gt => p > q,
                        Compare::Ge => p >= q,
                        Compare::Equ => p == q || nan,
                        Compare::Neu => p != q || nan,
                        Compare::Ltu => p < q || nan,
                        Compare::Leu => p <= q || nan,
                        Compare::Gtu => p > q || nan,
                        Compare::Geu => p >= q || nan,
                        Compare::Num => !nan,
                        Compare::Nan => nan,
                    }
                })
            };
        }
        let result = match ty {
            Ty::U8 | Ty::U16 => ordered!(word, u16, |x| x as u16),
            Ty::S8 | Ty::S16 => ordered!(word, i16, |x| x as i16),
            Ty::U32 => ordered!(word, u32, |x| x),
            Ty::S32 => ordered!(word, i32, |x| x as i32),
            Ty::U64 => ordered!(double, u64, |x| x),
            Ty::S64 => ordered!(double, i64, |x| x as i64),
            Ty::F32 => floats!(word, |x| f32::from_bits(x)),
            Ty::Bf16 => floats!(word, |x| bf16_to(x & 0xFFFF)),
            Ty::F16 => floats!(word, |x| f16_to(x & 0xFFFF)),
            Ty::F64 => floats!(double, |x| f64::from_bits(x)),
        };
        let with = |value: u32| {
            if c == NONE {
                return value;
            }
            let c = if c_not { !self.predicate(c) } else { self.predicate(c) };
            match logic {
                Logic::And => value & c,
                Logic::Or => value | c,
                Logic::Xor => value ^ c,
            }
        };
        let (p, n) = (with(result), with(!result));
        self.set_predicate(d, p, mask);
        self.set_predicate(q, n, mask);
    }

    #[inline(always)]
    pub(crate) fn cvt(
        &mut self,
        d: u32,
        (a, wide): (u32, bool),
        to: Ty,
        from: Ty,
        round: Round,
        saturate: bool,
        mask: u32,
    ) {
        let bits: [u64; LANES] = if wide { *self.double(a) } else { self.word(a).map(|x| x as u64) };
        let out = bits.map(|x| convert(x, to, from, round, saturate));
        match to.bytes() {
            8 => self.set_double(d, &out, mask),
            _ => self.set_word(d, &out.map(|x| x as u32), mask),
        }
    }
}

/// Of the lanes in `mask` alone.
#[inline(always)]
fn write_lanes<T: Copy>(to: &mut [T; LANES], values: &[T; LANES], mask: u32) {
    if mask == FULL {
        *to = *values;
    } else {
        for lane in 0..LANES {
            to[lane] = if mask >> lane & 1 != 0 { values[lane] } else { to[lane] };
        }
    }
}

fn float_in(x: u64, ty: Ty) -> f64 {
    match ty {
        Ty::F64 => f64::from_bits(x),
        Ty::F32 => f32::from_bits(x as u32) as f64,
        Ty::Bf16 => bf16_to(x as u32 & 0xFFFF) as f64,
        _ => f16_to(x as u32 & 0xFFFF) as f64,
    }
}

fn integer_in(x: u64, ty: Ty) -> i128 {
    match ty {
        Ty::U8 => x as u8 as i128,
        Ty::S8 => x as i8 as i128,
        Ty::U16 => x as u16 as i128,
        Ty::S16 => x as i16 as i128,
        Ty::U32 => x as u32 as i128,
        Ty::S32 => x as i32 as i128,
        Ty::S64 => x as i64 as i128,
        _ => x as i128,
    }
}

fn limits(ty: Ty) -> (i128, i128) {
    match ty {
        Ty::U8 => (0, u8::MAX as i128),
        Ty::S8 => (i8::MIN as i128, i8::MAX as i128),
        Ty::U16 => (0, u16::MAX as i128),
        Ty::S16 => (i16::MIN as i128, i16::MAX as i128),
        Ty::U32 => (0, u32::MAX as i128),
        Ty::S32 => (i32::MIN as i128, i32::MAX as i128),
        Ty::S64 => (i64::MIN as i128, i64::MAX as i128),
        _ => (0, u64::MAX as i128),
    }
}

/// The f32 next to `x` on the side that the rounding says.
fn to_f32(x: f64, round: Round) -> f32 {
    let near = x as f32;
    let up = |f: f32| if f as f64 >= x { f } else { f.next_up() };
    let down = |f: f32| if f as f64 <= x { f } else { f.next_down() };
    match round {
        Round::Up => up(near),
        Round::Down => down(near),
        Round::Zero if x > 0.0 => down(near),
        Round::Zero if x < 0.0 => up(near),
        _ => near,
    }
}

/// One `cvt`, bits to bits.
fn convert(x: u64, to: Ty, from: Ty, round: Round, saturate: bool) -> u64 {
    match (from.is_float(), to.is_float()) {
        (false, false) => {
            let value = integer_in(x, from);
            let value = if saturate {
                let (low, high) = limits(to);
                value.clamp(low, high)
            } else {
                value
            };
            match to.bytes() {
                8 => value as u64,
                // The bits above a narrow result are its sign, so that a wide register holds its value.
                1 if to.is_signed() => value as i8 as i32 as u32 as u64,
                1 => value as u8 as u64,
                2 if to.is_signed() => value as i16 as i32 as u32 as u64,
                2 => value as u16 as u64,
                _ => value as u32 as u64,
            }
        }
        (false, true) => {
            let value = integer_in(x, from);
            match to {
                Ty::F64 => (value as f64).to_bits(),
                Ty::F32 if matches!(round, Round::Nearest | Round::None) => (value as f32).to_bits() as u64,
                Ty::F32 => to_f32(value as f64, round).to_bits() as u64,
                Ty::Bf16 => bf16_of(value as f32) as u64,
                _ => f16_of(value as f32) as u64,
            }
        }
        (true, false) => {
            let value = float_in(x, from);
            if value.is_nan() {
                return match to {
                    Ty::S64 | Ty::U64 => 1 << 63,
                    _ => 0,
                };
            }
            let whole = rounded(value, round);
            let (low, high) = limits(to);
            let value = (whole as i128).clamp(low, high);
            if to.bytes() == 8 { value as u64 } else { value as u32 as u64 }
        }
        (true, true) => {
            let mut value = float_in(x, from);
            if matches!(round, Round::NearestInt | Round::ZeroInt | Round::DownInt | Round::UpInt) {
                value = rounded(value, round);
            }
            if saturate {
                value = if value.is_nan() { 0.0 } else { value.clamp(0.0, 1.0) };
            }
            match to {
                Ty::F64 => value.to_bits(),
                Ty::F32 => bits_of(to_f32(value, round)) as u64,
                // From f32 by way of f64 and back is exact.
                Ty::Bf16 if round == Round::Zero => (value as f32).to_bits() as u64 >> 16,
                Ty::Bf16 => bf16_of(value as f32) as u64,
                _ => f16_of(value as f32) as u64,
            }
        }
    }
}

fn rounded(x: f64, round: Round) -> f64 {
    match round {
        Round::NearestInt | Round::Nearest => x.round_ties_even(),
        Round::DownInt | Round::Down => x.floor(),
        Round::UpInt | Round::Up => x.ceil(),
        _ => x.trunc(),
    }
}
