//! Token order of the data contract: nested cubes, so that consecutive tokens are near in time and space.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A grid of latent tokens: frames, height, width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grid {
    /// Frames.
    pub t: u32,
    /// Rows.
    pub h: u32,
    /// Columns.
    pub w: u32,
}

impl Grid {
    /// Tokens of the grid.
    pub const fn tokens(self) -> usize {
        self.t as usize * self.h as usize * self.w as usize
    }

    /// Raster index of a token: frames outermost, columns innermost.
    pub const fn raster(self, t: u32, h: u32, w: u32) -> u32 {
        (t * self.h + h) * self.w + w
    }

    /// (t, h, w) of a raster index.
    pub const fn coordinates(self, raster: u32) -> (u32, u32, u32) {
        (raster / (self.h * self.w), raster / self.w % self.h, raster % self.w)
    }
}

/// The cube whose tokens are contiguous: powers of two a side. Written `4x4x8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cube {
    /// Frames.
    pub t: u32,
    /// Rows.
    pub h: u32,
    /// Columns.
    pub w: u32,
}

impl Cube {
    /// The contract's cube of a group size: 8 is 2x2x2, 64 is 4x4x4, 128 is 4x4x8, 256 is 4x8x8. Sizes that are no
    /// power of two get the cube of the largest power of two below.
    pub const fn of_group(query_group: u32) -> Cube {
        let mut side = [1u32; 3];
        let mut axis = 2;
        let mut size = 1;
        while size * 2 <= query_group {
            side[axis] *= 2;
            size *= 2;
            axis = if axis == 0 { 2 } else { axis - 1 };
        }
        Cube { t: side[0], h: side[1], w: side[2] }
    }

    /// Cubes of as many tokens as [`Cube::of_group`]'s, that one first, then shorter and longer ones in time: every power
    /// of two of frames, rows and columns as equal as they can be, columns at least as many as rows.
    pub fn shapes(query_group: u32) -> Vec<Cube> {
        let own = Cube::of_group(query_group);
        let bits = own.tokens().ilog2();
        let of = |t: u32| {
            let h = (bits - t) / 2;
            Cube { t: 1 << t, h: 1 << h, w: 1 << (bits - t - h) }
        };
        std::iter::once(own).chain((0..=bits).map(of).filter(|&cube| cube != own)).collect()
    }

    /// Tokens of the cube.
    pub const fn tokens(self) -> u32 {
        self.t * self.h * self.w
    }

    /// Whether one of it fits into the grid.
    pub const fn fits(self, grid: Grid) -> bool {
        self.t <= grid.t && self.h <= grid.h && self.w <= grid.w
    }
}

impl fmt::Display for Cube {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}", self.t, self.h, self.w)
    }
}

impl From<Cube> for String {
    fn from(cube: Cube) -> String {
        cube.to_string()
    }
}

impl TryFrom<String> for Cube {
    type Error = String;

    fn try_from(text: String) -> Result<Cube, String> {
        text.parse()
    }
}

impl FromStr for Cube {
    type Err = String;

    /// Frames x rows x columns, as [`Cube`] is written.
    fn from_str(text: &str) -> Result<Cube, String> {
        let sides: Vec<u32> = text.split('x').filter_map(|side| side.parse().ok()).collect();
        match sides[..] {
            [t, h, w] if [t, h, w].iter().all(|side| side.is_power_of_two() && *side <= 256) => {
                let cube = Cube { t, h, w };
                if cube.to_string() == text { Ok(cube) } else { Err(not_a_cube(text)) }
            }
            _ => Err(not_a_cube(text)),
        }
    }
}

fn not_a_cube(text: &str) -> String {
    format!("{text:?} is no cube of tokens; allowed: frames x rows x columns, powers of two, as in 4x4x8")
}

/// `order[i]` is the raster index of the i-th token in the contract's order.
///
/// Whole cubes come first, in raster order of cubes, each walked in nested cubes (Morton order: 8 consecutive tokens
/// are 2x2x2, 64 are 4x4x4, as far as the cube's sides allow). Tokens of the remainder, where the cube does not
/// divide the grid, follow in the same nested order of their own cut cubes, so that only the last group and the last
/// KV block of a sequence are short.
pub fn token_order(grid: Grid, cube: Cube) -> Vec<u32> {
    let mut whole = Vec::with_capacity(grid.tokens());
    let mut rest = Vec::new();
    for ct in (0..grid.t).step_by(cube.t as usize) {
        for ch in (0..grid.h).step_by(cube.h as usize) {
            for cw in (0..grid.w).step_by(cube.w as usize) {
                let fits = ct + cube.t <= grid.t && ch + cube.h <= grid.h && cw + cube.w <= grid.w;
                let target = if fits { &mut whole } else { &mut rest };
                for code in 0..cube.t * cube.h * cube.w {
                    let (t, h, w) = morton(code, cube);
                    if ct + t < grid.t && ch + h < grid.h && cw + w < grid.w {
                        target.push(grid.raster(ct + t, ch + h, cw + w));
                    }
                }
            }
        }
    }
    whole.append(&mut rest);
    whole
}

/// The inverse permutation: `inverse[order[i]] == i`.
pub fn invert_order(order: &[u32]) -> Vec<u32> {
    let mut inverse = vec![0; order.len()];
    for (i, &raster) in order.iter().enumerate() {
        inverse[raster as usize] = i as u32;
    }
    inverse
}

/// Spreads the bits of `code` over the axes, lowest bits to columns, rows, frames in turn, skipping axes that are
/// used up.
fn morton(mut code: u32, cube: Cube) -> (u32, u32, u32) {
    let sides = [cube.w, cube.h, cube.t];
    let mut out = [0u32; 3];
    let mut bit = 1;
    while sides.iter().any(|&s| bit < s) {
        for axis in 0..3 {
            if bit < sides[axis] {
                out[axis] |= (code & 1) * bit;
                code >>= 1;
            }
        }
        bit *= 2;
    }
    (out[2], out[1], out[0])
}
