//! Statements to instructions: every name resolved to a register, an address or a constant, so that execution looks
//! nothing up.

use crate::parse::{Class, Operand, Reg, Space, Statement, Text, Variable, bytes_of, number};
use std::collections::HashMap;
use std::sync::atomic::AtomicU64;

/// No register.
pub(crate) const NONE: u32 = u32::MAX;

/// Element types of conversions and of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ty {
    U8,
    S8,
    U16,
    S16,
    U32,
    S32,
    U64,
    S64,
    F16,
    Bf16,
    F32,
    F64,
}

impl Ty {
    fn of(name: &str) -> Option<Ty> {
        Some(match name {
            "b8" | "u8" => Ty::U8,
            "s8" => Ty::S8,
            "b16" | "u16" => Ty::U16,
            "s16" => Ty::S16,
            "b32" | "u32" | "f16x2" | "bf16x2" => Ty::U32,
            "s32" => Ty::S32,
            "b64" | "u64" => Ty::U64,
            "s64" => Ty::S64,
            "f16" => Ty::F16,
            "bf16" => Ty::Bf16,
            "f32" => Ty::F32,
            "f64" => Ty::F64,
            _ => return None,
        })
    }

    pub(crate) fn bytes(self) -> u32 {
        match self {
            Ty::U8 | Ty::S8 => 1,
            Ty::U16 | Ty::S16 | Ty::F16 | Ty::Bf16 => 2,
            Ty::U32 | Ty::S32 | Ty::F32 => 4,
            Ty::U64 | Ty::S64 | Ty::F64 => 8,
        }
    }

    pub(crate) fn is_float(self) -> bool {
        matches!(self, Ty::F16 | Ty::Bf16 | Ty::F32 | Ty::F64)
    }

    pub(crate) fn is_signed(self) -> bool {
        matches!(self, Ty::S8 | Ty::S16 | Ty::S32 | Ty::S64)
    }

    fn class(self) -> Class {
        if self.bytes() == 8 { Class::Double } else { Class::Word }
    }
}

/// What an arithmetic instruction does. `W` are words, `D` doubles, `H` 16-bit values in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[rustfmt::skip]
pub(crate) enum Arith {
    // Word from words.
    MovW, NotW, NegW, AbsW, Popc, Clz, Brev, BfindU, BfindS, BfindShiftU, FNeg, FAbs, Ex2, Lg2, Rcp, Sqrt, Rsqrt, Sin, Cos, Tanh,
    AddW, SubW, MulW, MulHiU, MulHiS, AndW, OrW, XorW, ShlW, ShrU, ShrS, MinU, MaxU, MinS, MaxS,
    DivU, DivS, RemU, RemS, FAdd, FSub, FMul, FMin, FMax, FMinNan, FMaxNan, FDiv, FCopysign,
    MadW, FFma, Sad, ShfLWrap, ShfRWrap, ShfLClamp, ShfRClamp, Prmt, BfeU, BfeS, Bfi, BfiD, Lop3,
    PackBf16, PackF16, PackBf16Relu, Cnot,
    // 16 bits.
    AddH, SubH, MulH, AndH, OrH, XorH, NotH, ShlH, ShrHu, ShrHs, MinHs, MaxHs, MinHu, MaxHu, NegH,
    // Packed.
    AddBf2, SubBf2, MulBf2, FmaBf2, MaxBf2, MinBf2, AddHf2, SubHf2, MulHf2, FmaHf2, MaxHf2, MinHf2,
    // Words of halves, doubles of words.
    PackHW, UnpackHW, PackWD, UnpackWD,
    // Double from doubles.
    MovD, NotD, NegD, AddD, SubD, MulD, MulHiUD, MulHiSD, AndD, OrD, XorD, ShlD, ShrUD, ShrSD, MinUD, MaxUD, MinSD, MaxSD,
    DivUD, DivSD, RemUD, RemSD, MadD, DAdd, DSub, DMul, DDiv, DFma, DMin, DMax, DNeg, DAbs, DSqrt, PopcD, ClzD, BrevD,
    // Double from words.
    MulWideU, MulWideS, MadWideU, MadWideS, MulWideHu, MulWideHs,
    // Selection: c is a predicate.
    SelW, SelD,
    // Predicates.
    MovP, NotP, AndP, OrP, XorP,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compare {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    /// As the ones above, true also where an operand is NaN.
    Equ,
    Neu,
    Ltu,
    Leu,
    Gtu,
    Geu,
    Num,
    Nan,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Logic {
    And,
    Or,
    Xor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Round {
    None,
    Nearest,
    Zero,
    Down,
    Up,
    NearestInt,
    ZeroInt,
    DownInt,
    UpInt,
}

/// Where a memory instruction goes; `Generic` looks at the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Where {
    Global,
    Shared,
    Local,
    Generic,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Atomic {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exch,
    Cas,
    Inc,
    Dec,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shuffle {
    Up,
    Down,
    Butterfly,
    Index,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vote {
    All,
    Any,
    Uni,
    Ballot,
}

/// An address: a register (a word for shared memory's own addresses, else a double) and an offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct At {
    pub(crate) base: Reg,
    pub(crate) offset: i64,
}

/// A matrix product's element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    Bf16,
    F16,
}

#[derive(Clone, Debug)]
pub(crate) enum Op {
    Alu {
        f: Arith,
        d: u32,
        a: u32,
        b: u32,
        c: u32,
        extra: u32,
    },
    Setp {
        ty: Ty,
        compare: Compare,
        d: u32,
        q: u32,
        a: u32,
        b: u32,
        logic: Logic,
        c: u32,
        c_not: bool,
    },
    /// `wide`: a narrow source in a register of 64 bits, as PTX allows.
    Cvt {
        d: u32,
        a: u32,
        wide: bool,
        to: Ty,
        from: Ty,
        round: Round,
        saturate: bool,
    },
    /// `wide`: narrow values in registers of 64 bits, as PTX allows.
    Ld {
        at: At,
        space: Where,
        ty: Ty,
        d: [u32; 8],
        count: u32,
        wide: bool,
    },
    St {
        at: At,
        space: Where,
        ty: Ty,
        a: [u32; 8],
        count: u32,
        wide: bool,
    },
    Atom {
        at: At,
        space: Where,
        ty: Ty,
        op: Atomic,
        d: u32,
        a: [u32; 4],
        b: u32,
        count: u32,
    },
    Bra,
    Exit,
    Trap,
    Nop,
    /// Lets others run.
    Yield,
    Shfl {
        mode: Shuffle,
        d: u32,
        p: u32,
        a: u32,
        b: u32,
        c: u32,
        members: u32,
    },
    Vote {
        mode: Vote,
        d: u32,
        a: u32,
        a_not: bool,
        members: u32,
    },
    MatchAny {
        wide: bool,
        all: bool,
        d: u32,
        p: u32,
        a: u32,
        members: u32,
    },
    Redux {
        op: Atomic,
        signed: bool,
        d: u32,
        a: u32,
        members: u32,
    },
    Elect {
        d: u32,
        p: u32,
        members: u32,
    },
    ActiveMask {
        d: u32,
    },
    WarpSync {
        members: u32,
    },
    Bar {
        id: u32,
        threads: u32,
        wait: bool,
        red: Option<BarRed>,
        d: u32,
        a: u32,
        a_not: bool,
    },
    MbarInit {
        at: At,
        count: u32,
    },
    MbarInval {
        at: At,
    },
    /// `count` arrivals (NONE: one) and `bytes` announced (NONE: none). `arrive` false: `expect_tx` alone.
    MbarArrive {
        at: At,
        state: u32,
        count: u32,
        bytes: u32,
        arrive: bool,
        drop: bool,
    },
    MbarWait {
        at: At,
        d: u32,
        phase: u32,
        state: bool,
        block: bool,
    },
    MbarCpAsync {
        at: At,
        noinc: bool,
    },
    FenceProxy,
    Fence,
    Clock {
        d: Reg,
    },
    LdMatrix {
        at: At,
        d: [u32; 4],
        count: u32,
        transpose: bool,
    },
    StMatrix {
        at: At,
        a: [u32; 4],
        count: u32,
        transpose: bool,
    },
    Mma {
        d: [u32; 4],
        a: [u32; 4],
        b: [u32; 4],
        c: [u32; 4],
        k: u32,
        half: Half,
    },
    Wgmma(Box<Wgmma>),
    WgmmaFence,
    WgmmaCommit,
    WgmmaWait {
        groups: u32,
    },
    SetMaxReg {
        count: u32,
    },
    CpAsync {
        to: At,
        from: At,
        bytes: u32,
        size: u32,
    },
    CpAsyncCommit,
    CpAsyncWait {
        groups: u32,
    },
    TensorLoad {
        to: At,
        map: At,
        barrier: At,
        coordinates: [u32; 5],
        rank: u32,
        multicast: u32,
    },
    TensorStore {
        from: At,
        map: At,
        coordinates: [u32; 5],
        rank: u32,
        reduce: Option<Atomic>,
    },
    BulkLoad {
        to: At,
        from: At,
        bytes: u32,
        barrier: At,
        multicast: u32,
    },
    BulkStore {
        to: At,
        from: At,
        bytes: u32,
        reduce: Option<(Atomic, Ty)>,
    },
    BulkToShared {
        to: At,
        from: At,
        bytes: u32,
        barrier: At,
    },
    BulkCommit,
    BulkWait {
        groups: u32,
        read: bool,
    },
    PrefetchMap {
        map: At,
    },
    MapA {
        d: Reg,
        a: Reg,
        rank: u32,
    },
    IsSpace {
        d: u32,
        a: u32,
        space: Where,
    },
    ClusterArrive,
    ClusterWait,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BarRed {
    And,
    Or,
    Popc,
}

#[derive(Clone, Debug)]
pub(crate) struct Wgmma {
    pub(crate) n: u32,
    pub(crate) half: Half,
    /// n / 2 registers.
    pub(crate) d: Vec<u32>,
    /// Registers of A, or none where a descriptor gives it.
    pub(crate) a: Option<[u32; 4]>,
    pub(crate) desc_a: u32,
    pub(crate) desc_b: u32,
    /// Predicate: whether D is added to.
    pub(crate) scale_d: u32,
    pub(crate) negate_a: bool,
    pub(crate) negate_b: bool,
    pub(crate) transpose_a: bool,
    pub(crate) transpose_b: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Instr {
    pub(crate) op: Op,
    /// 0: none; else (predicate + 1) << 1 | inverted.
    pub(crate) guard: u32,
    /// Of a branch.
    pub(crate) target: u32,
    pub(crate) line: u32,
    /// Words read and written, as ranges of `Kernel::operands`.
    pub(crate) reads: (u32, u32),
    pub(crate) writes: (u32, u32),
}

/// Values a register holds from the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[rustfmt::skip]
pub(crate) enum Special {
    TidX, TidY, TidZ, NtidX, NtidY, NtidZ, CtaidX, CtaidY, CtaidZ, NctaidX, NctaidY, NctaidZ, Lane, Warp, Warps,
    LaneEq, LaneLt, LaneLe, LaneGt, LaneGe, Sm, Sms, ClusterRank, ClusterSize,
    ClusterIdX, ClusterIdY, ClusterIdZ, ClusterCtaX, ClusterCtaY, ClusterCtaZ, ClusterNctaX, ClusterNctaY, ClusterNctaZ,
    DynamicShared, TotalShared,
}

/// A kernel ready to run.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) name: String,
    pub(crate) code: Vec<Instr>,
    pub(crate) operands: Vec<u32>,
    /// Words, doubles and predicates of a warp.
    pub(crate) words: u32,
    pub(crate) doubles: u32,
    pub(crate) predicates: u32,
    pub(crate) constant_words: Vec<(u32, u32)>,
    pub(crate) constant_doubles: Vec<(u32, u64)>,
    pub(crate) constant_predicates: Vec<(u32, bool)>,
    pub(crate) specials: Vec<(Special, u32)>,
    /// The launch's parameters are copied here; constants of the code hold its address.
    pub(crate) params: Box<[AtomicU64]>,
    pub(crate) params_bytes: u32,
    /// Offset and size of each parameter.
    pub(crate) param_places: Vec<(u32, u32)>,
    /// Variables in global and constant memory: their storage lives here.
    pub(crate) globals: Vec<(Box<[AtomicU64]>, u32)>,
    pub(crate) static_shared: u32,
    /// Where dynamic shared memory begins.
    pub(crate) dynamic_at: u32,
    pub(crate) local_bytes: u32,
    pub(crate) max_threads: u32,
    /// CTAs of a cluster where the text says so, else ones.
    pub(crate) cluster: [u32; 3],
    pub(crate) uses_wgmma: bool,
}

/// Shared memory begins here: what a driver keeps for itself on sm_90 lies below.
pub(crate) const SHARED_START: u32 = 1024;
/// Generic addresses of shared memory are this plus the address in shared memory.
pub(crate) const SHARED_WINDOW: u64 = 1 << 56;
/// Generic addresses of local memory.
pub(crate) const LOCAL_WINDOW: u64 = 1 << 57;

struct Decoder<'a> {
    words: u32,
    doubles: u32,
    predicates: u32,
    constants: HashMap<(Class, u64), u32>,
    specials: HashMap<Special, u32>,
    symbols: HashMap<&'a str, (Space, u64)>,
    operands: Vec<u32>,
}

fn align_up(value: u32, to: u32) -> u32 {
    value.div_ceil(to.max(1)) * to.max(1)
}

fn special(name: &str) -> Option<Special> {
    Some(match name {
        "%tid.x" => Special::TidX,
        "%tid.y" => Special::TidY,
        "%tid.z" => Special::TidZ,
        "%ntid.x" => Special::NtidX,
        "%ntid.y" => Special::NtidY,
        "%ntid.z" => Special::NtidZ,
        "%ctaid.x" => Special::CtaidX,
        "%ctaid.y" => Special::CtaidY,
        "%ctaid.z" => Special::CtaidZ,
        "%nctaid.x" => Special::NctaidX,
        "%nctaid.y" => Special::NctaidY,
        "%nctaid.z" => Special::NctaidZ,
        "%laneid" => Special::Lane,
        "%warpid" => Special::Warp,
        "%nwarpid" => Special::Warps,
        "%lanemask_eq" => Special::LaneEq,
        "%lanemask_lt" => Special::LaneLt,
        "%lanemask_le" => Special::LaneLe,
        "%lanemask_gt" => Special::LaneGt,
        "%lanemask_ge" => Special::LaneGe,
        "%smid" => Special::Sm,
        "%nsmid" => Special::Sms,
        "%cluster_ctarank" => Special::ClusterRank,
        "%cluster_nctarank" => Special::ClusterSize,
        "%clusterid.x" => Special::ClusterIdX,
        "%clusterid.y" => Special::ClusterIdY,
        "%clusterid.z" => Special::ClusterIdZ,
        "%cluster_ctaid.x" => Special::ClusterCtaX,
        "%cluster_ctaid.y" => Special::ClusterCtaY,
        "%cluster_ctaid.z" => Special::ClusterCtaZ,
        "%cluster_nctaid.x" => Special::ClusterNctaX,
        "%cluster_nctaid.y" => Special::ClusterNctaY,
        "%cluster_nctaid.z" => Special::ClusterNctaZ,
        "%dynamic_smem_size" => Special::DynamicShared,
        "%total_smem_size" => Special::TotalShared,
        _ => return None,
    })
}

impl<'a> Decoder<'a> {
    fn constant(&mut self, class: Class, value: u64) -> u32 {
        let next = match class {
            Class::Pred => &mut self.predicates,
            Class::Word => &mut self.words,
            Class::Double => &mut self.doubles,
        };
        *self.constants.entry((class, value)).or_insert_with(|| {
            *next += 1;
            *next - 1
        })
    }

    /// A register of `class` that holds the operand.
    fn read(&mut self, operand: &Operand, class: Class) -> Result<u32, String> {
        match operand {
            Operand::Reg(reg) if reg.class == class => Ok(reg.index),
            Operand::Reg(reg) => Err(format!("a {:?} register where a {class:?} is read", reg.class)),
            Operand::Number(text) => {
                let value = number(text).ok_or_else(|| format!("number {text}"))?;
                let bits = match class {
                    Class::Pred => (value != 0) as u64,
                    Class::Word => value as i64 as u32 as u64,
                    Class::Double => value as i64 as u64,
                };
                // 64-bit patterns above the range of i64 wrap above as wanted.
                let bits =
                    if class == Class::Double && value > i64::MAX as i128 { value as u64 } else { bits };
                Ok(self.constant(class, bits))
            }
            Operand::Special(name) => {
                let what = special(name).ok_or_else(|| format!("{name} is not emulated"))?;
                if class != Class::Word {
                    return Err(format!("{name} read as {class:?}"));
                }
                let next = &mut self.words;
                Ok(*self.specials.entry(what).or_insert_with(|| {
                    *next += 1;
                    *next - 1
                }))
            }
            Operand::Symbol(name) => {
                let (stem, offset) = match name.split_once('+') {
                    Some((stem, offset)) => (stem.trim(), number(offset.trim()).unwrap_or(0) as u64),
                    None => (name.as_str(), 0),
                };
                let (_, address) = *self.symbols.get(stem).ok_or_else(|| format!("no variable {stem}"))?;
                Ok(self.constant(class, address + offset))
            }
            other => Err(format!("{other:?} is not read as a {class:?}")),
        }
    }

    fn written(&self, operand: &Operand, class: Class) -> Result<u32, String> {
        match operand {
            Operand::Reg(reg) if reg.class == class => Ok(reg.index),
            Operand::Sink => Ok(NONE),
            other => Err(format!("{other:?} is not written as a {class:?}")),
        }
    }

    fn any(&mut self, operand: &Operand) -> Result<Reg, String> {
        match operand {
            Operand::Reg(reg) => Ok(*reg),
            Operand::Number(_) | Operand::Symbol(_) => {
                Ok(Reg { class: Class::Double, index: self.read(operand, Class::Double)? })
            }
            other => Err(format!("{other:?} is no value")),
        }
    }

    fn at(&mut self, operand: &Operand) -> Result<At, String> {
        match operand {
            Operand::Address { base, offset, .. } => Ok(At { base: self.any(base)?, offset: *offset }),
            other => Err(format!("{other:?} is no address")),
        }
    }

    fn predicate(&mut self, operand: &Operand) -> Result<(u32, bool), String> {
        match operand {
            Operand::Not(reg) => Ok((reg.index, true)),
            other => Ok((self.read(other, Class::Pred)?, false)),
        }
    }
}

fn has(statement: &Statement, word: &str) -> bool {
    statement.opcode.iter().any(|part| part == word)
}

fn space_of(statement: &Statement) -> Where {
    for part in &statement.opcode {
        match part.as_str() {
            "global" | "const" | "param" => return Where::Global,
            "shared" | "shared::cta" | "shared::cluster" => return Where::Shared,
            "local" => return Where::Local,
            _ => {}
        }
    }
    Where::Generic
}

fn type_of(statement: &Statement) -> Option<(Ty, &str)> {
    let name = statement.opcode.iter().rev().find(|part| bytes_of(part).is_some())?;
    Some((Ty::of(name)?, name))
}

fn atomic(name: &str) -> Option<Atomic> {
    Some(match name {
        "add" => Atomic::Add,
        "min" => Atomic::Min,
        "max" => Atomic::Max,
        "and" => Atomic::And,
        "or" => Atomic::Or,
        "xor" => Atomic::Xor,
        "exch" => Atomic::Exch,
        "cas" => Atomic::Cas,
        "inc" => Atomic::Inc,
        "dec" => Atomic::Dec,
        _ => return None,
    })
}

fn compare(name: &str) -> Option<Compare> {
    Some(match name {
        "eq" => Compare::Eq,
        "ne" => Compare::Ne,
        "lt" | "lo" => Compare::Lt,
        "le" | "ls" => Compare::Le,
        "gt" | "hi" => Compare::Gt,
        "ge" | "hs" => Compare::Ge,
        "equ" => Compare::Equ,
        "neu" => Compare::Neu,
        "ltu" => Compare::Ltu,
        "leu" => Compare::Leu,
        "gtu" => Compare::Gtu,
        "geu" => Compare::Geu,
        "num" => Compare::Num,
        "nan" => Compare::Nan,
        _ => return None,
    })
}

fn vector(operand: &Operand) -> Vec<&Operand> {
    match operand {
        Operand::Vector(list) => list.iter().collect(),
        other => vec![other],
    }
}

impl<'a> Decoder<'a> {
    fn registers<const N: usize>(
        &mut self,
        operand: &Operand,
        class: Class,
        write: bool,
    ) -> Result<([u32; N], u32), String> {
        let list = vector(operand);
        if list.len() > N {
            return Err(format!("{} registers where at most {N} are understood", list.len()));
        }
        let mut found = [NONE; N];
        for (to, operand) in found.iter_mut().zip(&list) {
            *to = if write { self.written(operand, class)? } else { self.read(operand, class)? };
        }
        Ok((found, list.len() as u32))
    }

    fn alu(&mut self, f: Arith, s: &Statement, classes: &[Class], d: Class) -> Result<Op, String> {
        let mut sources = [NONE; 4];
        for (i, class) in classes.iter().enumerate() {
            let operand = s.operands.get(i + 1).ok_or("an operand is missing")?;
            sources[i] = self.read(operand, *class)?;
        }
        let d = self.written(&s.operands[0], d)?;
        Ok(Op::Alu { f, d, a: sources[0], b: sources[1], c: sources[2], extra: sources[3] })
    }

    fn mov(&mut self, s: &Statement) -> Result<Op, String> {
        let (to, from) = (&s.operands[0], &s.operands[1]);
        let name = s.opcode.last().map(String::as_str).unwrap_or_default();
        match (to, from) {
            (Operand::Reg(d), Operand::Special(n))
                if n.starts_with("%clock") || n.starts_with("%globaltimer") =>
            {
                Ok(Op::Clock { d: *d })
            }
            (Operand::Vector(parts), _) => {
                let (class, f) = if name.ends_with("64") {
                    (Class::Double, Arith::UnpackWD)
                } else {
                    (Class::Word, Arith::UnpackHW)
                };
                let a = self.read(from, class)?;
                let d = self.written(&parts[0], Class::Word)?;
                let b = self.written(&parts[1], Class::Word)?;
                Ok(Op::Alu { f, d, a, b, c: NONE, extra: NONE })
            }
            (_, Operand::Vector(parts)) => {
                let (class, f) = if name.ends_with("64") {
                    (Class::Double, Arith::PackWD)
                } else {
                    (Class::Word, Arith::PackHW)
                };
                let a = self.read(&parts[0], Class::Word)?;
                let b = self.read(&parts[1], Class::Word)?;
                Ok(Op::Alu { f, d: self.written(to, class)?, a, b, c: NONE, extra: NONE })
            }
            (Operand::Reg(d), _) => {
                let f = match d.class {
                    Class::Pred => Arith::MovP,
                    Class::Word => Arith::MovW,
                    Class::Double => Arith::MovD,
                };
                Ok(Op::Alu { f, d: d.index, a: self.read(from, d.class)?, b: NONE, c: NONE, extra: NONE })
            }
            _ => Err("this form of mov is not emulated".into()),
        }
    }

    fn arithmetic(&mut self, s: &Statement) -> Result<Option<Op>, String> {
        use Class::{Double as D, Pred as P, Word as W};
        let name = s.opcode[0].as_str();
        let kind = s.opcode.last().map(String::as_str).unwrap_or_default();
        let (hi, wide) = (has(s, "hi"), has(s, "wide"));
        let nan = has(s, "NaN");
        let bits = bytes_of(kind).unwrap_or(0) * 8;
        let signed = kind.starts_with('s');
        let f = match (name, kind) {
            (
                "add" | "sub" | "mul" | "min" | "max" | "div" | "fma" | "mad" | "neg" | "abs" | "sqrt"
                | "rcp" | "copysign",
                "f32",
            ) => match name {
                "add" => Arith::FAdd,
                "sub" => Arith::FSub,
                "mul" => Arith::FMul,
                "min" if nan => Arith::FMinNan,
                "min" => Arith::FMin,
                "max" if nan => Arith::FMaxNan,
                "max" => Arith::FMax,
                "div" => Arith::FDiv,
                "fma" | "mad" => Arith::FFma,
                "neg" => Arith::FNeg,
                "abs" => Arith::FAbs,
                "sqrt" => Arith::Sqrt,
                "copysign" => Arith::FCopysign,
                _ => Arith::Rcp,
            },
            ("ex2", "f32") => Arith::Ex2,
            ("lg2", "f32") => Arith::Lg2,
            ("rsqrt", "f32") => Arith::Rsqrt,
            ("sin", "f32") => Arith::Sin,
            ("cos", "f32") => Arith::Cos,
            ("tanh", "f32") => Arith::Tanh,
            ("add", "f64") => Arith::DAdd,
            ("sub", "f64") => Arith::DSub,
            ("mul", "f64") => Arith::DMul,
            ("div", "f64") => Arith::DDiv,
            ("fma" | "mad", "f64") => Arith::DFma,
            ("min", "f64") => Arith::DMin,
            ("max", "f64") => Arith::DMax,
            ("neg", "f64") => Arith::DNeg,
            ("abs", "f64") => Arith::DAbs,
            ("sqrt", "f64") => Arith::DSqrt,
            ("add", "bf16x2") => Arith::AddBf2,
            ("sub", "bf16x2") => Arith::SubBf2,
            ("mul", "bf16x2") => Arith::MulBf2,
            ("fma", "bf16x2") => Arith::FmaBf2,
            ("max", "bf16x2") => Arith::MaxBf2,
            ("min", "bf16x2") => Arith::MinBf2,
            ("add", "f16x2") => Arith::AddHf2,
            ("sub", "f16x2") => Arith::SubHf2,
            ("mul", "f16x2") => Arith::MulHf2,
            ("fma", "f16x2") => Arith::FmaHf2,
            ("max", "f16x2") => Arith::MaxHf2,
            ("min", "f16x2") => Arith::MinHf2,
            (_, "f16" | "bf16" | "f32" | "f64" | "f16x2" | "bf16x2") => return Ok(None),
            ("and", "pred") => Arith::AndP,
            ("or", "pred") => Arith::OrP,
            ("xor", "pred") => Arith::XorP,
            ("not", "pred") => Arith::NotP,
            ("popc", _) if bits == 64 => Arith::PopcD,
            ("popc", _) => Arith::Popc,
            ("clz", _) if bits == 64 => Arith::ClzD,
            ("clz", _) => Arith::Clz,
            ("brev", "b32") => Arith::Brev,
            ("brev", "b64") => Arith::BrevD,
            ("bfind", "u32") if has(s, "shiftamt") => Arith::BfindShiftU,
            ("bfind", "u32") => Arith::BfindU,
            ("bfind", "s32") => Arith::BfindS,
            ("bfe", "u32") => Arith::BfeU,
            ("bfe", "s32") => Arith::BfeS,
            ("bfi", "b32") => Arith::Bfi,
            ("bfi", "b64") => Arith::BfiD,
            ("prmt", "b32") => Arith::Prmt,
            ("lop3", "b32") => Arith::Lop3,
            ("cnot", "b32") => Arith::Cnot,
            ("sad", "u32") => Arith::Sad,
            ("shf", "b32") => match (has(s, "l"), has(s, "wrap")) {
                (true, true) => Arith::ShfLWrap,
                (true, false) => Arith::ShfLClamp,
                (false, true) => Arith::ShfRWrap,
                (false, false) => Arith::ShfRClamp,
            },
            ("mul", _) if wide && bits == 32 => {
                if signed {
                    Arith::MulWideS
                } else {
                    Arith::MulWideU
                }
            }
            ("mul", _) if wide && bits == 16 => {
                if signed {
                    Arith::MulWideHs
                } else {
                    Arith::MulWideHu
                }
            }
            ("mad", _) if wide && bits == 32 => {
                if signed {
                    Arith::MadWideS
                } else {
                    Arith::MadWideU
                }
            }
            ("mul", _) if hi && bits == 32 => {
                if signed {
                    Arith::MulHiS
                } else {
                    Arith::MulHiU
                }
            }
            ("mul", _) if hi && bits == 64 => {
                if signed {
                    Arith::MulHiSD
                } else {
                    Arith::MulHiUD
                }
            }
            ("mad", _) if hi => return Ok(None),
            (
                "add" | "sub" | "mul" | "mad" | "div" | "rem" | "min" | "max" | "and" | "or" | "xor" | "not"
                | "neg" | "abs" | "shl" | "shr",
                _,
            ) if bits > 0 => match (name, bits) {
                ("add", 32) => Arith::AddW,
                ("sub", 32) => Arith::SubW,
                ("mul", 32) => Arith::MulW,
                ("mad", 32) => Arith::MadW,
                ("div", 32) => {
                    if signed {
                        Arith::DivS
                    } else {
                        Arith::DivU
                    }
                }
                ("rem", 32) => {
                    if signed {
                        Arith::RemS
                    } else {
                        Arith::RemU
                    }
                }
                ("min", 32) => {
                    if signed {
                        Arith::MinS
                    } else {
                        Arith::MinU
                    }
                }
                ("max", 32) => {
                    if signed {
                        Arith::MaxS
                    } else {
                        Arith::MaxU
                    }
                }
                ("and", 32) => Arith::AndW,
                ("or", 32) => Arith::OrW,
                ("xor", 32) => Arith::XorW,
                ("not", 32) => Arith::NotW,
                ("neg", 32) => Arith::NegW,
                ("abs", 32) => Arith::AbsW,
                ("shl", 32) => Arith::ShlW,
                ("shr", 32) => {
                    if signed {
                        Arith::ShrS
                    } else {
                        Arith::ShrU
                    }
                }
                ("add", 64) => Arith::AddD,
                ("sub", 64) => Arith::SubD,
                ("mul", 64) => Arith::MulD,
                ("mad", 64) => Arith::MadD,
                ("div", 64) => {
                    if signed {
                        Arith::DivSD
                    } else {
                        Arith::DivUD
                    }
                }
                ("rem", 64) => {
                    if signed {
                        Arith::RemSD
                    } else {
                        Arith::RemUD
                    }
                }
                ("min", 64) => {
                    if signed {
                        Arith::MinSD
                    } else {
                        Arith::MinUD
                    }
                }
                ("max", 64) => {
                    if signed {
                        Arith::MaxSD
                    } else {
                        Arith::MaxUD
                    }
                }
                ("and", 64) => Arith::AndD,
                ("or", 64) => Arith::OrD,
                ("xor", 64) => Arith::XorD,
                ("not", 64) => Arith::NotD,
                ("neg", 64) => Arith::NegD,
                ("shl", 64) => Arith::ShlD,
                ("shr", 64) => {
                    if signed {
                        Arith::ShrSD
                    } else {
                        Arith::ShrUD
                    }
                }
                ("add", 16) => Arith::AddH,
                ("sub", 16) => Arith::SubH,
                ("mul", 16) => Arith::MulH,
                ("and", 16) => Arith::AndH,
                ("or", 16) => Arith::OrH,
                ("xor", 16) => Arith::XorH,
                ("not", 16) => Arith::NotH,
                ("neg", 16) => Arith::NegH,
                ("shl", 16) => Arith::ShlH,
                ("shr", 16) => {
                    if signed {
                        Arith::ShrHs
                    } else {
                        Arith::ShrHu
                    }
                }
                ("min", 16) => {
                    if signed {
                        Arith::MinHs
                    } else {
                        Arith::MinHu
                    }
                }
                ("max", 16) => {
                    if signed {
                        Arith::MaxHs
                    } else {
                        Arith::MaxHu
                    }
                }
                _ => return Ok(None),
            },
            _ => return Ok(None),
        };
        let (sources, d): (&[Class], Class) = match f {
            Arith::AndP | Arith::OrP | Arith::XorP => (&[P, P], P),
            Arith::NotP => (&[P], P),
            Arith::PopcD | Arith::ClzD => (&[D], W),
            Arith::MulWideU | Arith::MulWideS => (&[W, W], D),
            Arith::MulWideHu | Arith::MulWideHs => (&[W, W], W),
            Arith::MadWideU | Arith::MadWideS => (&[W, W, D], D),
            Arith::ShlD | Arith::ShrUD | Arith::ShrSD => (&[D, W], D),
            Arith::DNeg | Arith::DAbs | Arith::DSqrt | Arith::NotD | Arith::NegD | Arith::BrevD => (&[D], D),
            Arith::MadD | Arith::DFma => (&[D, D, D], D),
            Arith::DAdd
            | Arith::DSub
            | Arith::DMul
            | Arith::DDiv
            | Arith::DMin
            | Arith::DMax
            | Arith::AddD
            | Arith::SubD
            | Arith::MulD
            | Arith::MulHiUD
            | Arith::MulHiSD
            | Arith::AndD
            | Arith::OrD
            | Arith::XorD
            | Arith::MinUD
            | Arith::MaxUD
            | Arith::MinSD
            | Arith::MaxSD
            | Arith::DivUD
            | Arith::DivSD
            | Arith::RemUD
            | Arith::RemSD => (&[D, D], D),
            Arith::NotW
            | Arith::NegW
            | Arith::AbsW
            | Arith::Popc
            | Arith::Clz
            | Arith::Brev
            | Arith::BfindU
            | Arith::BfindS
            | Arith::BfindShiftU
            | Arith::FNeg
            | Arith::FAbs
            | Arith::Ex2
            | Arith::Lg2
            | Arith::Rcp
            | Arith::Sqrt
            | Arith::Rsqrt
            | Arith::Sin
            | Arith::Cos
            | Arith::Tanh
            | Arith::NotH
            | Arith::NegH
            | Arith::Cnot => (&[W], W),
            Arith::Bfi | Arith::Lop3 => (&[W, W, W, W], W),
            Arith::BfiD => (&[D, D, W, W], D),
            Arith::FFma
            | Arith::MadW
            | Arith::ShfLWrap
            | Arith::ShfRWrap
            | Arith::ShfLClamp
            | Arith::ShfRClamp
            | Arith::Prmt
            | Arith::BfeU
            | Arith::BfeS
            | Arith::Sad
            | Arith::FmaBf2
            | Arith::FmaHf2 => (&[W, W, W], W),
            _ => (&[W, W], W),
        };
        // The last source of a shift of doubles is a word in PTX, too.
        self.alu(f, s, sources, d).map(Some)
    }

    fn cvt(&mut self, s: &Statement) -> Result<Op, String> {
        let kinds: Vec<&str> =
            s.opcode.iter().map(String::as_str).filter(|p| bytes_of(p).is_some()).collect();
        let [to, from] = kinds[..] else { return Err("cvt without two types".into()) };
        if matches!(to, "bf16x2" | "f16x2") && from == "f32" {
            let f = match (to, has(s, "relu")) {
                ("bf16x2", false) => Arith::PackBf16,
                ("bf16x2", true) => Arith::PackBf16Relu,
                ("f16x2", false) => Arith::PackF16,
                _ => return Err("this cvt is not emulated".into()),
            };
            if !has(s, "rn") {
                return Err("only cvt.rn to packed halves is emulated".into());
            }
            return self.alu(f, s, &[Class::Word, Class::Word], Class::Word);
        }
        let (to, from) = (Ty::of(to).ok_or("cvt type")?, Ty::of(from).ok_or("cvt type")?);
        let mut round = Round::None;
        for part in &s.opcode {
            round = match part.as_str() {
                "rn" | "rna" => Round::Nearest,
                "rz" => Round::Zero,
                "rm" => Round::Down,
                "rp" => Round::Up,
                "rni" => Round::NearestInt,
                "rzi" => Round::ZeroInt,
                "rmi" => Round::DownInt,
                "rpi" => Round::UpInt,
                _ => round,
            };
        }
        if has(s, "relu") {
            return Err("cvt.relu of one value is not emulated".into());
        }
        let class = widened(&s.operands[1], from);
        Ok(Op::Cvt {
            d: self.written(&s.operands[0], to.class())?,
            a: self.read(&s.operands[1], class)?,
            wide: class == Class::Double,
            to,
            from,
            round,
            saturate: has(s, "sat"),
        })
    }

    fn setp(&mut self, s: &Statement) -> Result<Op, String> {
        let (ty, _) = type_of(s).ok_or("setp without a type")?;
        let how = compare(&s.opcode[1]).ok_or_else(|| format!("comparison {}", s.opcode[1]))?;
        let class = ty.class();
        let (d, q) = match &s.operands[0] {
            Operand::Pair(p, q) => (self.written(p, Class::Pred)?, self.written(q, Class::Pred)?),
            one => (self.written(one, Class::Pred)?, NONE),
        };
        let logic = match s.opcode[2].as_str() {
            "or" => Logic::Or,
            "xor" => Logic::Xor,
            _ => Logic::And,
        };
        let (c, c_not) = match s.operands.get(3) {
            Some(operand) => self.predicate(operand)?,
            None => (NONE, false),
        };
        Ok(Op::Setp {
            ty,
            compare: how,
            d,
            q,
            a: self.read(&s.operands[1], class)?,
            b: self.read(&s.operands[2], class)?,
            logic,
            c,
            c_not,
        })
    }

    fn tensor(&mut self, s: &Statement) -> Result<Op, String> {
        if has(s, "im2col") || has(s, "gather4") || has(s, "scatter4") {
            return Err("only tiles are emulated".into());
        }
        let rank: u32 = s
            .opcode
            .iter()
            .find_map(|part| part.strip_suffix('d').and_then(|n| n.parse().ok()))
            .ok_or("a tensor copy without its rank")?;
        let reduce = s.opcode[1] == "reduce" || s.opcode[0] == "cp" && has(s, "reduce");
        let reduce = if reduce {
            Some(
                s.opcode
                    .iter()
                    .skip(2)
                    .find_map(|part| atomic(part))
                    .ok_or("a reduction without its operation")?,
            )
        } else {
            None
        };
        let first_space = s.opcode.iter().find(|p| p.starts_with("shared") || p.as_str() == "global");
        let load = first_space.is_some_and(|space| space.starts_with("shared"));
        let map = if load { &s.operands[1] } else { &s.operands[0] };
        let Operand::Address { rest, .. } = map else {
            return Err("a tensor copy without coordinates".into());
        };
        let list = rest.first().ok_or("a tensor copy without coordinates")?;
        let (coordinates, count) = self.registers::<5>(list, Class::Word, false)?;
        if count != rank {
            return Err(format!("{count} coordinates of {rank} dimensions"));
        }
        let map = self.at(map)?;
        if load {
            let multicast =
                if has(s, "multicast::cluster") { self.read(&s.operands[3], Class::Word)? } else { NONE };
            let (to, barrier) = (self.at(&s.operands[0])?, self.at(&s.operands[2])?);
            Ok(Op::TensorLoad { to, map, barrier, coordinates, rank, multicast })
        } else {
            Ok(Op::TensorStore { from: self.at(&s.operands[1])?, map, coordinates, rank, reduce })
        }
    }

    fn copy(&mut self, s: &Statement) -> Result<Op, String> {
        let bulk = has(s, "bulk");
        let groups = |s: &Statement| match s.operands.first() {
            Some(Operand::Number(n)) => Ok(number(n).unwrap_or(0) as u32),
            Some(_) => Err("groups in a register"),
            None => Ok(0),
        };
        if has(s, "mbarrier") {
            return Ok(Op::MbarCpAsync { at: self.at(&s.operands[0])?, noinc: has(s, "noinc") });
        }
        if has(s, "commit_group") {
            return Ok(if bulk { Op::BulkCommit } else { Op::CpAsyncCommit });
        }
        if has(s, "wait_group") || has(s, "wait_all") {
            // All, what is not committed included.
            let groups = if has(s, "wait_all") { NONE } else { groups(s)? };
            return Ok(if bulk {
                Op::BulkWait { groups, read: has(s, "read") }
            } else {
                Op::CpAsyncWait { groups }
            });
        }
        if has(s, "prefetch") {
            return Ok(Op::Nop);
        }
        if has(s, "tensor") {
            return self.tensor(s);
        }
        if !bulk {
            let bytes = match &s.operands[2] {
                Operand::Number(n) => number(n).unwrap_or(0) as u32,
                _ => return Err("cp.async with its size in a register".into()),
            };
            let size = match s.operands.get(3) {
                Some(Operand::Reg(reg)) if reg.class == Class::Pred => {
                    return Err("cp.async with ignore-src".into());
                }
                Some(_) if has(s, "L2::cache_hint") && s.operands.len() == 4 => NONE,
                Some(operand) => self.read(operand, Class::Word)?,
                None => NONE,
            };
            let (to, from) = (self.at(&s.operands[0])?, self.at(&s.operands[1])?);
            return Ok(Op::CpAsync { to, from, bytes, size });
        }
        let reduce = s.opcode[1] == "reduce";
        let spaces: Vec<&str> = s
            .opcode
            .iter()
            .map(String::as_str)
            .filter(|p| p.starts_with("shared") || *p == "global")
            .collect();
        let (to, from) = (self.at(&s.operands[0])?, self.at(&s.operands[1])?);
        let bytes = self.read(&s.operands[2], Class::Word)?;
        match (spaces.first().copied(), spaces.get(1).copied()) {
            (Some("global"), Some(_)) => {
                let reduce = if reduce {
                    let (ty, _) = type_of(s).ok_or("a reduction without a type")?;
                    Some((s.opcode.iter().skip(2).find_map(|p| atomic(p)).ok_or("a reduction")?, ty))
                } else {
                    None
                };
                Ok(Op::BulkStore { to, from, bytes, reduce })
            }
            (Some(_), Some("global")) if !reduce => {
                let barrier = self.at(&s.operands[3])?;
                let multicast =
                    if has(s, "multicast::cluster") { self.read(&s.operands[4], Class::Word)? } else { NONE };
                Ok(Op::BulkLoad { to, from, bytes, barrier, multicast })
            }
            (Some("shared::cluster"), Some("shared::cta")) if !reduce => {
                Ok(Op::BulkToShared { to, from, bytes, barrier: self.at(&s.operands[3])? })
            }
            _ => Err("this bulk copy is not emulated".into()),
        }
    }

    fn mbarrier(&mut self, s: &Statement) -> Result<Op, String> {
        match s.opcode[1].as_str() {
            "init" => Ok(Op::MbarInit {
                at: self.at(&s.operands[0])?,
                count: self.read(&s.operands[1], Class::Word)?,
            }),
            "inval" => Ok(Op::MbarInval { at: self.at(&s.operands[0])? }),
            "expect_tx" => Ok(Op::MbarArrive {
                at: self.at(&s.operands[0])?,
                state: NONE,
                count: NONE,
                bytes: self.read(&s.operands[1], Class::Word)?,
                arrive: false,
                drop: false,
            }),
            "arrive" | "arrive_drop" => {
                let address = s.operands.iter().position(|o| matches!(o, Operand::Address { .. }));
                let address = address.ok_or("mbarrier.arrive without an address")?;
                let state = match address {
                    0 => NONE,
                    _ => self.written(&s.operands[0], Class::Double)?,
                };
                let extra = match s.operands.get(address + 1) {
                    Some(operand) => self.read(operand, Class::Word)?,
                    None => NONE,
                };
                let expect = has(s, "expect_tx");
                Ok(Op::MbarArrive {
                    at: self.at(&s.operands[address])?,
                    state,
                    count: if expect { NONE } else { extra },
                    bytes: if expect { extra } else { NONE },
                    arrive: true,
                    drop: s.opcode[1] == "arrive_drop",
                })
            }
            "try_wait" | "test_wait" => {
                let parity = has(s, "parity");
                let class = if parity { Class::Word } else { Class::Double };
                Ok(Op::MbarWait {
                    at: self.at(&s.operands[1])?,
                    d: self.written(&s.operands[0], Class::Pred)?,
                    phase: self.read(&s.operands[2], class)?,
                    state: !parity,
                    block: s.opcode[1] == "try_wait",
                })
            }
            other => Err(format!("mbarrier.{other} is not emulated")),
        }
    }

    fn wgmma(&mut self, s: &Statement) -> Result<Op, String> {
        match s.opcode[1].as_str() {
            "fence" => return Ok(Op::WgmmaFence),
            "commit_group" => return Ok(Op::WgmmaCommit),
            "wait_group" => {
                let Some(Operand::Number(n)) = s.operands.first() else {
                    return Err("wait_group of what".into());
                };
                return Ok(Op::WgmmaWait { groups: number(n).unwrap_or(0) as u32 });
            }
            "mma_async" => {}
            other => return Err(format!("wgmma.{other} is not emulated")),
        }
        let shape = s.opcode.iter().find(|p| p.starts_with("m64n")).ok_or("wgmma without a shape")?;
        let (n, k) = shape[4..].split_once('k').ok_or("wgmma without a shape")?;
        let n: u32 = n.parse().map_err(|_| "wgmma's n")?;
        let kinds: Vec<&str> =
            s.opcode.iter().map(String::as_str).filter(|p| bytes_of(p).is_some()).collect();
        let half = match kinds[..] {
            ["f32", "bf16", "bf16"] => Half::Bf16,
            ["f32", "f16", "f16"] => Half::F16,
            _ => return Err(format!("wgmma of {kinds:?} is not emulated")),
        };
        if k != "16" || n == 0 || n > 256 || !n.is_multiple_of(8) {
            return Err(format!("wgmma shape {shape}"));
        }
        let Operand::Vector(d) = &s.operands[0] else { return Err("wgmma's accumulators".into()) };
        let d: Result<Vec<u32>, String> = d.iter().map(|o| self.written(o, Class::Word)).collect();
        let d = d?;
        if d.len() != n as usize / 2 {
            return Err(format!("{} accumulators of n {n}", d.len()));
        }
        let mut immediates = Vec::new();
        for operand in &s.operands[4..] {
            let Operand::Number(text) = operand else { return Err("wgmma's immediates".into()) };
            immediates.push(number(text).unwrap_or(0));
        }
        let (a, desc_a) = match &s.operands[1] {
            Operand::Vector(_) => (Some(self.registers::<4>(&s.operands[1], Class::Word, false)?.0), NONE),
            descriptor => (None, self.read(descriptor, Class::Double)?),
        };
        let desc_b = self.read(&s.operands[2], Class::Double)?;
        let scale_d = self.read(&s.operands[3], Class::Pred)?;
        let (transpose_a, transpose_b) = match (a.is_some(), &immediates[..]) {
            (false, [_, _, ta, tb]) => (*ta != 0, *tb != 0),
            (true, [_, _, tb]) => (false, *tb != 0),
            _ => return Err("wgmma's immediates".into()),
        };
        Ok(Op::Wgmma(Box::new(Wgmma {
            n,
            half,
            d,
            a,
            desc_a,
            desc_b,
            scale_d,
            negate_a: immediates[0] < 0,
            negate_b: immediates[1] < 0,
            transpose_a,
            transpose_b,
        })))
    }

    fn barrier(&mut self, s: &Statement) -> Result<Op, String> {
        if has(s, "warp") {
            return Ok(Op::WarpSync { members: self.read(&s.operands[0], Class::Word)? });
        }
        if has(s, "cluster") {
            return Ok(if has(s, "arrive") { Op::ClusterArrive } else { Op::ClusterWait });
        }
        let red = if has(s, "red") {
            Some(if has(s, "popc") {
                BarRed::Popc
            } else if has(s, "and") {
                BarRed::And
            } else {
                BarRed::Or
            })
        } else {
            None
        };
        let mut operands = &s.operands[..];
        let mut d = NONE;
        let (mut a, mut a_not) = (NONE, false);
        if let Some(red) = red {
            d = self.written(&operands[0], if red == BarRed::Popc { Class::Word } else { Class::Pred })?;
            let last = operands.last().ok_or("bar.red without a predicate")?;
            (a, a_not) = self.predicate(last)?;
            operands = &operands[1..operands.len() - 1];
        }
        let id = self.read(&operands[0], Class::Word)?;
        let threads = match operands.get(1) {
            Some(operand) => self.read(operand, Class::Word)?,
            None => NONE,
        };
        Ok(Op::Bar { id, threads, wait: !has(s, "arrive"), red, d, a, a_not })
    }

    fn op(&mut self, s: &Statement) -> Result<Op, String> {
        let name = s.opcode[0].as_str();
        match name {
            "mov" => self.mov(s),
            "cvt" => self.cvt(s),
            "setp" => self.setp(s),
            "selp" => {
                let class = class_of_type(s)?;
                let f = if class == Class::Double { Arith::SelD } else { Arith::SelW };
                let d = self.written(&s.operands[0], class)?;
                let (a, b) = (self.read(&s.operands[1], class)?, self.read(&s.operands[2], class)?);
                let (c, not) = self.predicate(&s.operands[3])?;
                let (a, b) = if not { (b, a) } else { (a, b) };
                Ok(Op::Alu { f, d, a, b, c, extra: NONE })
            }
            "cvta" => {
                // Addresses of global memory, constants and parameters are generic already.
                let to = has(s, "to");
                let window = match space_of(s) {
                    Where::Shared => SHARED_WINDOW,
                    Where::Local => LOCAL_WINDOW,
                    _ => 0,
                };
                let d = self.written(&s.operands[0], Class::Double)?;
                let a = self.read(&s.operands[1], Class::Double)?;
                let b = self.constant(Class::Double, window);
                Ok(Op::Alu { f: if to { Arith::SubD } else { Arith::AddD }, d, a, b, c: NONE, extra: NONE })
            }
            "ld" | "ldu" => {
                let (ty, _) = type_of(s).ok_or("a load without a type")?;
                let class = widened(&s.operands[0], ty);
                let (d, count) = self.registers::<8>(&s.operands[0], class, true)?;
                let wide = class != ty.class();
                Ok(Op::Ld { at: self.at(&s.operands[1])?, space: space_of(s), ty, d, count, wide })
            }
            "st" => {
                let (ty, _) = type_of(s).ok_or("a store without a type")?;
                if has(s, "async") {
                    return Err("st.async is not emulated".into());
                }
                let class = widened(&s.operands[1], ty);
                let (a, count) = self.registers::<8>(&s.operands[1], class, false)?;
                let wide = class != ty.class();
                Ok(Op::St { at: self.at(&s.operands[0])?, space: space_of(s), ty, a, count, wide })
            }
            "atom" | "red" => {
                let (ty, kind) = type_of(s).ok_or("an atomic without a type")?;
                if kind.contains("x2") || matches!(ty, Ty::F16 | Ty::Bf16) {
                    return Err("atomics of halves are not emulated".into());
                }
                let op = s
                    .opcode
                    .iter()
                    .skip(1)
                    .find_map(|p| atomic(p))
                    .ok_or("an atomic without its operation")?;
                let class = ty.class();
                let (d, rest) = match name {
                    "atom" => {
                        if matches!(s.operands[0], Operand::Vector(_)) {
                            return Err("atom of vectors is not emulated".into());
                        }
                        (self.written(&s.operands[0], class)?, &s.operands[1..])
                    }
                    _ => (NONE, &s.operands[..]),
                };
                let at = self.at(&rest[0])?;
                let (a, count) = self.registers::<4>(&rest[1], class, false)?;
                let b = if op == Atomic::Cas { self.read(&rest[2], class)? } else { NONE };
                Ok(Op::Atom { at, space: space_of(s), ty, op, d, a, b, count })
            }
            "bra" => Ok(Op::Bra),
            "ret" | "exit" => Ok(Op::Exit),
            "trap" | "brkpt" => Ok(Op::Trap),
            "nanosleep" | "pmevent" => Ok(Op::Yield),
            "shfl" => {
                let mode = match s.opcode[2].as_str() {
                    "up" => Shuffle::Up,
                    "down" => Shuffle::Down,
                    "bfly" => Shuffle::Butterfly,
                    "idx" => Shuffle::Index,
                    other => return Err(format!("shfl.{other}")),
                };
                let (d, p) = match &s.operands[0] {
                    Operand::Pair(d, p) => (self.written(d, Class::Word)?, self.written(p, Class::Pred)?),
                    one => (self.written(one, Class::Word)?, NONE),
                };
                let mut sources = [NONE; 4];
                for (to, operand) in sources.iter_mut().zip(&s.operands[1..]) {
                    *to = self.read(operand, Class::Word)?;
                }
                let [a, b, c, members] = sources;
                Ok(Op::Shfl { mode, d, p, a, b, c, members })
            }
            "vote" => {
                let mode = match s.opcode[2].as_str() {
                    "all" => Vote::All,
                    "any" => Vote::Any,
                    "uni" => Vote::Uni,
                    "ballot" => Vote::Ballot,
                    other => return Err(format!("vote.{other}")),
                };
                let class = if mode == Vote::Ballot { Class::Word } else { Class::Pred };
                let d = self.written(&s.operands[0], class)?;
                let (a, a_not) = self.predicate(&s.operands[1])?;
                Ok(Op::Vote { mode, d, a, a_not, members: self.read(&s.operands[2], Class::Word)? })
            }
            "match" => {
                let wide = has(s, "b64");
                let (d, p) = match &s.operands[0] {
                    Operand::Pair(d, p) => (self.written(d, Class::Word)?, self.written(p, Class::Pred)?),
                    one => (self.written(one, Class::Word)?, NONE),
                };
                let a = self.read(&s.operands[1], if wide { Class::Double } else { Class::Word })?;
                let members = self.read(&s.operands[2], Class::Word)?;
                Ok(Op::MatchAny { wide, all: has(s, "all"), d, p, a, members })
            }
            "redux" => {
                let op = atomic(&s.opcode[2]).ok_or("redux without its operation")?;
                Ok(Op::Redux {
                    op,
                    signed: has(s, "s32"),
                    d: self.written(&s.operands[0], Class::Word)?,
                    a: self.read(&s.operands[1], Class::Word)?,
                    members: self.read(&s.operands[2], Class::Word)?,
                })
            }
            "elect" => {
                let (d, p) = match &s.operands[0] {
                    Operand::Pair(d, p) => (self.written(d, Class::Word)?, self.written(p, Class::Pred)?),
                    _ => return Err("elect.sync without a predicate".into()),
                };
                Ok(Op::Elect { d, p, members: self.read(&s.operands[1], Class::Word)? })
            }
            "activemask" => Ok(Op::ActiveMask { d: self.written(&s.operands[0], Class::Word)? }),
            "bar" | "barrier" => self.barrier(s),
            "mbarrier" => self.mbarrier(s),
            "fence" | "membar" => {
                let proxy = has(s, "proxy") && s.opcode.iter().any(|p| p.starts_with("async"));
                Ok(if proxy { Op::FenceProxy } else { Op::Fence })
            }
            "ldmatrix" | "stmatrix" => {
                let transpose = has(s, "trans");
                if !has(s, "m8n8") || !has(s, "b16") {
                    return Err("only m8n8 matrices of b16 are emulated".into());
                }
                if name == "ldmatrix" {
                    let (d, count) = self.registers::<4>(&s.operands[0], Class::Word, true)?;
                    Ok(Op::LdMatrix { at: self.at(&s.operands[1])?, d, count, transpose })
                } else {
                    let (a, count) = self.registers::<4>(&s.operands[1], Class::Word, false)?;
                    Ok(Op::StMatrix { at: self.at(&s.operands[0])?, a, count, transpose })
                }
            }
            "mma" => {
                let kinds: Vec<&str> =
                    s.opcode.iter().map(String::as_str).filter(|p| bytes_of(p).is_some()).collect();
                let half = match kinds[..] {
                    ["f32", "bf16", "bf16", "f32"] => Half::Bf16,
                    ["f32", "f16", "f16", "f32"] => Half::F16,
                    _ => return Err(format!("mma of {kinds:?} is not emulated")),
                };
                let k = match (has(s, "m16n8k16"), has(s, "m16n8k8")) {
                    (true, _) => 16,
                    (_, true) => 8,
                    _ => return Err("this mma shape is not emulated".into()),
                };
                Ok(Op::Mma {
                    d: self.registers::<4>(&s.operands[0], Class::Word, true)?.0,
                    a: self.registers::<4>(&s.operands[1], Class::Word, false)?.0,
                    b: self.registers::<4>(&s.operands[2], Class::Word, false)?.0,
                    c: self.registers::<4>(&s.operands[3], Class::Word, false)?.0,
                    k,
                    half,
                })
            }
            "wgmma" => self.wgmma(s),
            "setmaxnreg" => {
                let Some(Operand::Number(n)) = s.operands.first() else {
                    return Err("setmaxnreg of what".into());
                };
                Ok(Op::SetMaxReg { count: number(n).unwrap_or(0) as u32 })
            }
            "cp" => self.copy(s),
            "prefetch" | "prefetchu" => {
                if has(s, "tensormap") {
                    return Ok(Op::PrefetchMap { map: self.at(&s.operands[0])? });
                }
                Ok(Op::Nop)
            }
            "applypriority" | "discard" | "griddepcontrol" => Ok(Op::Nop),
            "mapa" => {
                let Operand::Reg(d) = s.operands[0] else { return Err("mapa into what".into()) };
                Ok(Op::MapA {
                    d,
                    a: self.any(&s.operands[1])?,
                    rank: self.read(&s.operands[2], Class::Word)?,
                })
            }
            "isspacep" => Ok(Op::IsSpace {
                d: self.written(&s.operands[0], Class::Pred)?,
                a: self.read(&s.operands[1], Class::Double)?,
                space: space_of(s),
            }),
            _ => match self.arithmetic(s)? {
                Some(op) => Ok(op),
                None => Err("not emulated".into()),
            },
        }
    }

    /// Words that a statement reads and writes, for the check of registers in flight.
    fn note(&mut self, s: &Statement) -> ((u32, u32), (u32, u32)) {
        fn collect(operand: &Operand, into: &mut Vec<u32>) {
            match operand {
                Operand::Reg(reg) if reg.class == Class::Word => into.push(reg.index),
                Operand::Vector(list) => list.iter().for_each(|o| collect(o, into)),
                Operand::Address { base, rest, .. } => {
                    collect(base, into);
                    rest.iter().for_each(|o| collect(o, into));
                }
                Operand::Pair(a, b) => {
                    collect(a, into);
                    collect(b, into);
                }
                _ => {}
            }
        }
        let writes_first = !matches!(
            s.opcode[0].as_str(),
            "st" | "red"
                | "stmatrix"
                | "cp"
                | "bar"
                | "barrier"
                | "prefetch"
                | "fence"
                | "nanosleep"
                | "bra"
                | "ret"
        ) && !matches!(s.operands.first(), Some(Operand::Address { .. }));
        let mut range = |operands: &[Operand]| {
            let first = self.operands.len() as u32;
            operands.iter().for_each(|o| collect(o, &mut self.operands));
            (first, self.operands.len() as u32)
        };
        let split = if writes_first { 1.min(s.operands.len()) } else { 0 };
        let writes = range(&s.operands[..split]);
        let reads = range(&s.operands[split..]);
        (reads, writes)
    }
}

/// The class of the registers of a load or store: narrow values may stand in registers of 64 bits.
fn widened(operand: &Operand, ty: Ty) -> Class {
    let wide = vector(operand).iter().any(|o| matches!(o, Operand::Reg(Reg { class: Class::Double, .. })));
    if wide { Class::Double } else { ty.class() }
}

fn class_of_type(s: &Statement) -> Result<Class, String> {
    type_of(s).map(|(ty, _)| ty.class()).ok_or_else(|| "an instruction without a type".to_string())
}

/// Decodes the entry `name`.
///
/// # Errors
/// The first instruction that is not emulated, with its line.
pub(crate) fn decode(text: &Text, name: &str) -> Result<Kernel, String> {
    let function = text
        .functions
        .iter()
        .find(|f| f.entry && f.name == name)
        .ok_or_else(|| format!("the text has no entry {name}"))?;
    let mut symbols: HashMap<&str, (Space, u64)> = HashMap::new();
    let all: Vec<&Variable> = text.variables.iter().chain(&function.variables).collect();
    let mut shared = SHARED_START;
    let mut local = 0;
    let mut globals = Vec::new();
    for v in &all {
        match v.space {
            Space::Shared if v.bytes > 0 => {
                shared = align_up(shared, v.align);
                symbols.insert(&v.name, (Space::Shared, shared as u64));
                shared += v.bytes;
            }
            Space::Shared => {}
            Space::Local => {
                local = align_up(local, v.align);
                symbols.insert(&v.name, (Space::Local, local as u64));
                local += v.bytes;
            }
            Space::Global | Space::Const => {
                let mut data = vec![0u64; (v.bytes as usize).div_ceil(8).max(1) + 1];
                for (i, byte) in v.init.iter().enumerate() {
                    data[i / 8] |= (*byte as u64) << (8 * (i % 8));
                }
                let data: Box<[AtomicU64]> = data.into_iter().map(AtomicU64::new).collect();
                symbols.insert(&v.name, (v.space, data.as_ptr() as u64));
                globals.push((data, v.bytes));
            }
            Space::Param => {}
        }
    }
    let dynamic: Vec<&&Variable> = all.iter().filter(|v| v.space == Space::Shared && v.bytes == 0).collect();
    let align = dynamic.iter().map(|v| v.align).max().unwrap_or(16);
    let dynamic_at = align_up(shared, align.max(16));
    for v in dynamic {
        symbols.insert(&v.name, (Space::Shared, dynamic_at as u64));
    }
    let mut params_bytes = 0;
    let mut param_places = Vec::new();
    for v in &function.params {
        params_bytes = align_up(params_bytes, v.align);
        param_places.push((params_bytes, v.bytes));
        params_bytes += v.bytes;
    }
    // Tensor maps in the parameters are 64-byte aligned.
    let params: Box<[AtomicU64]> = (0..params_bytes as usize / 8 + 9).map(|_| AtomicU64::new(0)).collect();
    let params_at = (params.as_ptr() as u64).next_multiple_of(64);
    for (v, (offset, _)) in function.params.iter().zip(&param_places) {
        symbols.insert(&v.name, (Space::Param, params_at + *offset as u64));
    }
    let mut decoder = Decoder {
        predicates: function.registers[0],
        words: function.registers[1],
        doubles: function.registers[2],
        constants: HashMap::new(),
        specials: HashMap::new(),
        symbols,
        operands: Vec::new(),
    };
    let mut code = Vec::with_capacity(function.statements.len() + 1);
    for s in &function.statements {
        let op = decoder
            .op(s)
            .map_err(|why| format!("line {} of the PTX: {}: {why}", s.line, s.opcode.join(".")))?;
        let (reads, writes) = decoder.note(s);
        let guard = s.guard.map_or(0, |(p, not)| (p + 1) << 1 | not as u32);
        code.push(Instr { op, guard, target: s.target.unwrap_or(NONE), line: s.line, reads, writes });
    }
    let last = function.statements.last().map_or(0, |s| s.line);
    code.push(Instr { op: Op::Exit, guard: 0, target: NONE, line: last, reads: (0, 0), writes: (0, 0) });
    let uses_wgmma = code.iter().any(|i| matches!(i.op, Op::Wgmma(_)));
    let mut kernel = Kernel {
        name: name.to_string(),
        code,
        operands: decoder.operands,
        words: decoder.words,
        doubles: decoder.doubles,
        predicates: decoder.predicates,
        constant_words: Vec::new(),
        constant_doubles: Vec::new(),
        constant_predicates: Vec::new(),
        specials: decoder.specials.into_iter().collect(),
        params,
        params_bytes,
        param_places,
        globals,
        static_shared: shared - SHARED_START,
        dynamic_at,
        local_bytes: local,
        max_threads: function.max_threads,
        cluster: function.cluster,
        uses_wgmma,
    };
    for ((class, value), index) in decoder.constants {
        match class {
            Class::Pred => kernel.constant_predicates.push((index, value != 0)),
            Class::Word => kernel.constant_words.push((index, value as u32)),
            Class::Double => kernel.constant_doubles.push((index, value)),
        }
    }
    Ok(kernel)
}

impl Kernel {
    /// Where the launch's parameters go.
    pub(crate) fn params_at(&self) -> u64 {
        (self.params.as_ptr() as u64).next_multiple_of(64)
    }
}
