use serde::{Deserialize, Serialize};

/// Declares a field-less enum with a fixed spelling in names, JSON and prose.
macro_rules! tokens {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        pub enum $name { $($(#[$vdoc])* #[serde(rename = $text)] $variant),+ }
        impl $name {
            /// Every value, in order.
            pub const ALL: &'static [$name] = &[$($name::$variant),+];
            /// The spelling used in kernel names and JSON.
            pub const fn name(self) -> &'static str { match self { $($name::$variant => $text),+ } }
            /// The value with this spelling, if there is one.
            pub fn from_name(text: &str) -> Option<Self> { match text { $($text => Some($name::$variant),)+ _ => None } }
        }
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str(self.name()) }
        }
    };
}
pub(crate) use tokens;

tokens! {
    /// Element type of a tensor in device memory.
    Dtype {
        /// bfloat16: 8 exponent bits, 7 mantissa bits.
        Bf16 = "bf16",
        /// IEEE half: 5 exponent bits, 10 mantissa bits.
        F16 = "f16",
        /// IEEE single.
        F32 = "f32",
    }
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> u32 {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
        }
    }
}

/// The GPU architecture a text is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Arch {
    /// Ampere: `mma.sync`, `cp.async`.
    #[serde(rename = "sm80")]
    Sm80,
    /// Hopper with its architecture-specific instructions: `wgmma`, TMA, `setmaxnreg`.
    #[serde(rename = "sm90a")]
    Sm90a,
}

impl Arch {
    /// Every architecture.
    pub const ALL: &'static [Arch] = &[Arch::Sm80, Arch::Sm90a];

    /// The spelling in kernel names.
    pub const fn name(self) -> &'static str {
        match self {
            Arch::Sm80 => "sm80",
            Arch::Sm90a => "sm90a",
        }
    }

    /// The value of NVRTC's `--gpu-architecture` for the first GPUs of this architecture: what ships ahead is compiled
    /// for.
    pub const fn nvrtc(self) -> &'static str {
        match self {
            Arch::Sm80 => "sm_80",
            Arch::Sm90a => "sm_90a",
        }
    }

    /// Reads a user's spelling: `sm90` means `sm90a`.
    pub fn from_name(text: &str) -> Option<Arch> {
        match text {
            "sm80" => Some(Arch::Sm80),
            "sm90" | "sm90a" => Some(Arch::Sm90a),
            _ => None,
        }
    }

    /// The value of NVRTC's `--gpu-architecture` with which a text of this architecture is compiled for a device of this
    /// compute capability; `None` where the device lacks its instructions. The architecture says which instructions a
    /// text uses: a text of sm80 is compiled for a GPU of 9.0 as well, though a cubin made for 8.0 does not run there.
    pub const fn nvrtc_for(self, major: i32, minor: i32) -> Option<&'static str> {
        match (self, major, minor) {
            (Arch::Sm80, 8, 0..) => Some(Arch::Sm80.nvrtc()),
            (Arch::Sm80 | Arch::Sm90a, 9, 0) => Some(Arch::Sm90a.nvrtc()),
            _ => None,
        }
    }

    /// Whether a device of this compute capability runs a cubin made ahead, with [`Arch::nvrtc`].
    pub const fn runs_on(self, major: i32, minor: i32) -> bool {
        match self {
            Arch::Sm80 => major == 8 && minor >= 0,
            Arch::Sm90a => major == 9 && minor == 0,
        }
    }
}

impl std::fmt::Display for Arch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

tokens! {
    /// Whether two runs on the same input give the same bits.
    Deterministic {
        /// Floating-point reductions happen in the order the hardware takes them.
        No = "nondet",
        /// Every sum has a fixed order.
        Yes = "det",
    }
}
