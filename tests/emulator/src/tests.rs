//! The interpreter against plain arithmetic, and kernels with one defect each, which must be found whatever the seed.

use crate::block::Fault;
use crate::decode::decode;
use crate::float::{bf16_of, bf16_to};
use crate::launch::{Shape, launch};
use crate::memory::Region;
use crate::parse::parse;
use crate::tensor_map::{TensorMap, swizzled};

/// Device memory of a test: 16-byte aligned, with a hole after it.
struct Buffer(Vec<u128>);

impl Buffer {
    fn of(words: &[u32]) -> Buffer {
        let mut data = vec![0u128; words.len().div_ceil(4)];
        for (i, &w) in words.iter().enumerate() {
            data[i / 4] |= (w as u128) << (32 * (i % 4));
        }
        Buffer(data)
    }

    fn words(&self) -> Vec<u32> {
        self.0.iter().flat_map(|x| (0..4).map(move |i| (x >> (32 * i)) as u32)).collect()
    }

    fn region(&self) -> Region {
        let start = self.0.as_ptr() as u64;
        Region { start, end: start + 16 * self.0.len() as u64, writable: true }
    }
}

/// Runs `body` as a kernel of `threads` threads and one CTA: see [`run_cluster`].
fn run_with(
    body: &str,
    threads: u32,
    a: &Buffer,
    b: &Buffer,
    map: Option<TensorMap>,
    seed: u64,
) -> Result<(), Fault> {
    run_cluster(body, 1, threads, a, b, map, seed)
}

/// Runs `body` as a kernel of `threads` threads and one cluster of `ctas` CTAs, with two buffers at %rd1 and %rd2 and `params`' first
/// tensor map at %rd3; it has 64 registers of each kind, and shared memory at `raw`.
fn run_cluster(
    body: &str,
    ctas: u32,
    threads: u32,
    a: &Buffer,
    b: &Buffer,
    map: Option<TensorMap>,
    seed: u64,
) -> Result<(), Fault> {
    let text = format!(
        ".version 9.0\n.target sm_90a\n.address_size 64\n.extern .shared .align 1024 .b8 raw[];\n\
         .visible .entry test(\n.param .align 64 .b8 test_param_0[160]\n)\n{{\n\
         .reg .pred %p<64>;\n.reg .b16 %h<64>;\n.reg .b32 %r<300>;\n.reg .f32 %f<300>;\n.reg .b64 %rd<64>;\n.reg .f64 %fd<8>;\n\
         ld.param.u64 %rd1, [test_param_0+128];\nld.param.u64 %rd2, [test_param_0+136];\n\
         mov.b64 %rd3, test_param_0;\nmov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
    );
    let kernel = parse(&text).and_then(|text| decode(&text, "test")).unwrap_or_else(|why| panic!("{why}"));
    let mut params = Vec::new();
    for word in map.map_or([0; 16], TensorMap::to_words) {
        params.extend_from_slice(&word.to_le_bytes());
    }
    for buffer in [a, b] {
        params.extend_from_slice(&buffer.region().start.to_le_bytes());
    }
    params.resize(160, 0);
    let of_x = |n| [n, 1, 1];
    let shape =
        Shape { grid: of_x(ctas), block: of_x(threads), cluster: of_x(ctas), dynamic_shared: 64 << 10 };
    launch(&kernel, &shape, &params, &[a.region(), b.region()], seed)
}

fn run(body: &str, threads: u32, a: &Buffer, b: &Buffer) {
    for seed in 0..4 {
        run_with(body, threads, a, b, None, seed)
            .unwrap_or_else(|fault| panic!("seed {seed}: {}", fault.text));
    }
}

/// Some of many orders must find the defect, and say so with these words.
fn finds(body: &str, threads: u32, map: Option<TensorMap>, a: &Buffer, words: &str) {
    let b = Buffer::of(&[0; 4096]);
    let mut found = 0;
    for seed in 0..16 {
        if let Err(fault) = run_with(body, threads, a, &b, map, seed) {
            assert!(fault.text.contains(words), "another fault than '{words}': {}", fault.text);
            found += 1;
        }
    }
    assert!(found > 0, "nothing found in 16 orders; wanted '{words}'");
}

fn empty() -> Buffer {
    Buffer::of(&[0; 4096])
}

/// `value` of each thread to the output.
const STORE: &str =
    "mul.wide.u32 %rd20, %r0, 4;\nadd.s64 %rd21, %rd2, %rd20;\nst.global.u32 [%rd21], %r40;\n";

#[test]
fn lanes_part_and_meet_again() {
    // Each lane counts to its number; then all shuffle.
    let body = format!(
        "mov.u32 %r1, 0;\nLOOP:\nsetp.ge.u32 %p1, %r1, %r0;\n@%p1 bra OUT;\nadd.u32 %r1, %r1, 1;\nbra LOOP;\nOUT:\n\
         setp.lt.u32 %p2, %r0, 7;\n@%p2 bra SMALL;\nmul.lo.u32 %r1, %r1, 3;\nbra.uni MEET;\nSMALL:\nadd.u32 %r1, %r1, 100;\n\
         MEET:\nshfl.sync.bfly.b32 %r40, %r1, 1, 31, -1;\n{STORE}"
    );
    let out = empty();
    run(&body, 32, &empty(), &out);
    let value = |lane: u32| if lane < 7 { lane + 100 } else { 3 * lane };
    assert_eq!(out.words()[..32], (0..32).map(|l| value(l ^ 1)).collect::<Vec<u32>>());
}

#[test]
fn shuffles_votes_and_sums() {
    type OfLane = fn(u32) -> u32;
    let checks: [(&str, OfLane); 7] = [
        ("shfl.sync.up.b32 %r40, %r0, 3, 0, -1;", |l| if l >= 3 { l - 3 } else { l }),
        ("shfl.sync.down.b32 %r40, %r0, 3, 31, -1;", |l| if l + 3 <= 31 { l + 3 } else { l }),
        // Segments of eight.
        ("shfl.sync.down.b32 %r40, %r0, 1, 6175, -1;", |l| if l % 8 == 7 { l } else { l + 1 }),
        ("shfl.sync.idx.b32 %r40, %r0, 5, 31, -1;", |_| 5),
        ("setp.lt.u32 %p1, %r0, 5;\nvote.sync.ballot.b32 %r40, %p1, -1;", |_| 31),
        ("redux.sync.add.s32 %r40, %r0, -1;", |_| 496),
        ("and.b32 %r1, %r0, 3;\nmatch.any.sync.b32 %r40, %r1, -1;", |l| 0x1111_1111 << (l % 4)),
    ];
    for (text, wanted) in checks {
        let out = empty();
        run(&format!("{text}\n{STORE}"), 32, &empty(), &out);
        assert_eq!(out.words()[..32], (0..32).map(wanted).collect::<Vec<u32>>(), "{text}");
    }
}

#[test]
fn bits_and_conversions() {
    let f = |x: f32| x.to_bits();
    let checks: [(&str, u32); 22] = [
        // The NaN of arithmetic has no sign: kernels shift its top bit.
        ("mov.f32 %f1, 0f7F800000;\nsub.f32 %f2, %f1, %f1;\nmov.b32 %r40, %f2;", 0x7FFF_FFFF),
        ("mov.u32 %r1, 305419896;\nprmt.b32 %r40, %r1, 0, 291;", 0x7856_3412),
        ("mov.u32 %r1, 240;\nbfe.u32 %r40, %r1, 4, 4;", 15),
        ("mov.u32 %r1, 240;\nbfe.s32 %r40, %r1, 4, 4;", u32::MAX),
        ("mov.u32 %r1, 5;\nmov.u32 %r2, -1;\nbfi.b32 %r40, %r1, %r2, 4, 4;", 0xFFFF_FF5F),
        (
            "mov.b64 %rd20, 5;\nmov.b64 %rd21, -1;\nbfi.b64 %rd22, %rd20, %rd21, 36, 4;\nshr.u64 %rd22, %rd22, 32;\ncvt.u32.u64 %r40, %rd22;",
            0xFFFF_FF5F,
        ),
        // The narrow source of a conversion may lie in a wide register, whose upper half does not count.
        (
            "mov.b64 %rd20, 8589934585;\ncvt.s64.s32 %rd21, %rd20;\nshr.u64 %rd21, %rd21, 32;\ncvt.u32.u64 %r40, %rd21;",
            u32::MAX,
        ),
        ("mov.u32 %r1, 1;\nshf.l.wrap.b32 %r40, 0, %r1, 33;", 2),
        ("mov.u32 %r1, 12;\nmov.u32 %r2, 10;\nlop3.b32 %r40, %r1, %r2, 0, 192;", 8),
        ("mov.u32 %r1, 40;\nmov.u32 %r2, 3;\nshl.b32 %r40, %r2, %r1;", 0),
        ("mov.f32 %f1, 0f3FC00000;\ncvt.rni.s32.f32 %r40, %f1;", 2),
        ("mov.f32 %f1, 0f7FC00000;\ncvt.rzi.s32.f32 %r40, %f1;", 0),
        ("mov.f32 %f1, 0fCF800000;\ncvt.rzi.s32.f32 %r40, %f1;", i32::MIN as u32),
        (
            "mov.f32 %f1, 0f40400000;\nmov.f32 %f2, 0f3F800000;\ncvt.rn.bf16x2.f32 %r40, %f1, %f2;",
            0x4040_3F80,
        ),
        ("mov.f32 %f1, 0f40400000;\nex2.approx.ftz.f32 %f2, %f1;\nmov.b32 %r40, %f2;", 0x4100_0000),
        ("mov.f32 %f1, 0fFF800000;\nex2.approx.ftz.f32 %f2, %f1;\nmov.b32 %r40, %f2;", 0),
        // 2^-126.5 and the logarithm of 2^-127: denormals are zeros.
        ("mov.f32 %f1, 0fC2FD0000;\nex2.approx.ftz.f32 %f2, %f1;\nmov.b32 %r40, %f2;", 0),
        ("mov.f32 %f1, 0f00400000;\nlg2.approx.ftz.f32 %f2, %f1;\nmov.b32 %r40, %f2;", 0xFF80_0000),
        ("mov.f32 %f1, 0f00800000;\nlg2.approx.ftz.f32 %f2, %f1;\nmov.b32 %r40, %f2;", 0xC2FC_0000),
        ("mov.u32 %r1, -7;\nmov.u32 %r2, 2;\ndiv.s32 %r40, %r1, %r2;", -3i32 as u32),
        ("mov.u32 %r1, 16;\nclz.b32 %r40, %r1;", 27),
        (
            "mov.f32 %f1, 0f7FC00000;\nmax.NaN.f32 %f2, %f1, 0f00000000;\nsetp.nan.f32 %p1, %f2, %f2;\nselp.u32 %r40, 1, 0, %p1;",
            1,
        ),
    ];
    for (text, wanted) in checks {
        let out = empty();
        run(&format!("{text}\n{STORE}"), 32, &empty(), &out);
        assert_eq!(out.words()[3], wanted, "{text}");
    }
    // Powers of two within two units of the last place, over the whole range.
    for i in -1300..1300 {
        let x = i as f32 * 0.1;
        let (found, exact) = (crate::float::exp2(x), (x as f64).exp2());
        let exact = if exact < f32::MIN_POSITIVE as f64 { 0.0 } else { exact as f32 };
        assert!(
            found == exact || (f(found) as i64 - f(exact) as i64).abs() <= 2,
            "2^{x} = {found}, wanted {exact}"
        );
    }
}

#[test]
fn a_barrier_in_shared_memory_hands_over_phase_by_phase() {
    // Warp 1 writes a word eight times, warp 0 adds up what it reads; two barriers say full and empty.
    let body = "mov.u64 %rd10, raw;\ncvt.u32.u64 %r10, %rd10;\nadd.u32 %r11, %r10, 8;\nadd.u32 %r12, %r10, 16;\n\
        setp.ne.u32 %p1, %r0, 0;\n@%p1 bra INIT;\nmbarrier.init.shared::cta.b64 [%r10], 32;\n\
        mbarrier.init.shared::cta.b64 [%r11], 32;\nINIT:\nbar.sync 0;\nmov.u32 %r1, 0;\nmov.u32 %r40, 0;\n\
        setp.ge.u32 %p2, %r0, 32;\n@%p2 bra PRODUCE;\n\
        CONSUME:\nand.b32 %r2, %r1, 1;\nW1:\nmbarrier.try_wait.parity.shared::cta.b64 %p3, [%r10], %r2;\n@!%p3 bra W1;\n\
        ld.shared.u32 %r3, [%r12];\nadd.u32 %r40, %r40, %r3;\nmbarrier.arrive.shared::cta.b64 _, [%r11];\n\
        add.u32 %r1, %r1, 1;\nsetp.lt.u32 %p4, %r1, 8;\n@%p4 bra CONSUME;\nbra.uni END;\n\
        PRODUCE:\nand.b32 %r2, %r1, 1;\nxor.b32 %r2, %r2, 1;\n\
        W2:\nmbarrier.try_wait.parity.shared::cta.b64 %p3, [%r11], %r2;\n@!%p3 bra W2;\n\
        st.shared.u32 [%r12], %r1;\nmbarrier.arrive.shared::cta.b64 _, [%r10];\nadd.u32 %r1, %r1, 1;\n\
        setp.lt.u32 %p4, %r1, 8;\n@%p4 bra PRODUCE;\nEND:\n";
    let out = empty();
    run(&format!("{body}{STORE}"), 64, &empty(), &out);
    assert_eq!(out.words()[0], 28, "0 + 1 + ... + 7");
}

/// Copies the first buffer's `bytes` to `raw`, by one thread, and lets all threads wait for it. The barrier lies at
/// raw + 61440.
fn bulk_load(bytes: u32) -> String {
    format!(
        "mov.u64 %rd10, raw;\ncvt.u32.u64 %r10, %rd10;\nadd.u32 %r11, %r10, 61440;\nsetp.ne.u32 %p1, %r0, 0;\n@%p1 bra INIT;\n\
         mbarrier.init.shared::cta.b64 [%r11], 1;\nfence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n\
         mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r11], {bytes};\n\
         cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r10], [%rd1], {bytes}, [%r11];\nINIT:\nbar.sync 0;\n\
         WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [%r11], 0;\n@!%p2 bra WAIT;\n"
    )
}

#[test]
fn tensor_loads_swizzle_and_fill_with_zeros() {
    // 10 rows of 64 halves; a box of 8 rows from row 5 on: three rows are outside.
    let rows: Vec<u32> = (0..320).collect();
    let from = Buffer::of(&rows);
    for (code, span) in [(0, 0), (3, 128), (2, 64), (1, 32)] {
        let width = if span == 0 { 64 } else { span / 2 };
        let map = TensorMap::encode(
            9,
            2,
            from.region().start,
            &[64, 10],
            &[128],
            &[width, 8],
            &[1, 1],
            0,
            code,
            false,
        )
        .unwrap();
        let bytes = map.box_bytes();
        let body = format!(
            "mov.u64 %rd10, raw;\ncvt.u32.u64 %r10, %rd10;\nadd.u32 %r11, %r10, 61440;\nmov.u32 %r5, 0;\nmov.u32 %r6, 5;\n\
             setp.ne.u32 %p1, %r0, 0;\n@%p1 bra INIT;\nmbarrier.init.shared::cta.b64 [%r11], 1;\nfence.proxy.async;\n\
             mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r11], {bytes};\n\
             cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r10], [%rd3, {{%r5, %r6}}], [%r11];\n\
             INIT:\nbar.sync 0;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [%r11], 0;\n@!%p2 bra WAIT;\n\
             mov.u32 %r1, %r0;\nCOPY:\nshl.b32 %r2, %r1, 2;\nadd.u32 %r3, %r10, %r2;\nld.shared.u32 %r4, [%r3];\n\
             cvt.u64.u32 %rd20, %r2;\nadd.s64 %rd21, %rd2, %rd20;\nst.global.u32 [%rd21], %r4;\nadd.u32 %r1, %r1, 32;\n\
             setp.lt.u32 %p3, %r1, {};\n@%p3 bra COPY;\n",
            bytes / 4
        );
        let out = empty();
        for seed in 0..4 {
            run_with(&body, 32, &from, &out, Some(map), seed).unwrap_or_else(|f| panic!("{}", f.text));
        }
        let found = out.words();
        for row in 0..8 {
            for word in 0..width / 2 {
                // Spelt out: 16-byte pieces of a row are exchanged by the row's number within the span's atom.
                let line = row * width * 2 + 4 * word;
                let (mut piece, atom_row) = (line / 16, line / 128 % 8);
                piece ^= match span {
                    128 => atom_row,
                    64 => atom_row % 4,
                    32 => atom_row % 2,
                    _ => 0,
                };
                let at = (piece * 16 + line % 16) / 4;
                let wanted = if row < 5 { rows[((row + 5) * 32 + word) as usize] } else { 0 };
                assert_eq!(found[at as usize], wanted, "span {span}, row {row}, word {word}");
            }
        }
    }
}

/// How an operand of a product lies in shared memory.
#[derive(Clone, Copy, Debug)]
enum Lies {
    /// Rows of k, swizzled with this span (0: pieces of 8 by 8).
    K(u32),
    /// Rows of m or n, likewise.
    Mn(u32),
}

/// Writes `mn` x 16 elements into a shared memory image from byte `at` on; returns the descriptor's fields.
fn lay(image: &mut [u8], at: u32, lies: Lies, mn: u32, value: impl Fn(u32, u32) -> u32) -> (u64, bool) {
    let (mut leading, mut stride) = (16, 16);
    for r in 0..mn {
        for k in 0..16 {
            let place = match lies {
                Lies::K(0) => {
                    (leading, stride) = (128, 256);
                    at + r / 8 * 256 + k / 8 * 128 + r % 8 * 16 + k % 8 * 2
                }
                Lies::K(span) => {
                    stride = 8 * span;
                    swizzled(at + r * span + k * 2, span)
                }
                Lies::Mn(0) => {
                    (leading, stride) = (128, 256);
                    at + r / 8 * 256 + k / 8 * 128 + k % 8 * 16 + r % 8 * 2
                }
                Lies::Mn(span) => {
                    let wide = span / 2;
                    (leading, stride) = (16 * span, 8 * span);
                    swizzled(at + r / wide * 16 * span + k * span + r % wide * 2, span)
                }
            };
            image[place as usize..][..2].copy_from_slice(&(value(r, k) as u16).to_le_bytes());
        }
    }
    let (Lies::K(span) | Lies::Mn(span)) = lies;
    let code = [0u64, 3, 2, 0, 1][span as usize / 32];
    // The image lies at 1024.
    let start = (at as u64 + 1024) >> 4;
    let bits = start | (leading as u64 >> 4) << 16 | (stride as u64 >> 4) << 32 | code << 62;
    (bits, matches!(lies, Lies::Mn(_)))
}

#[test]
fn products_of_a_warpgroup() {
    let a = |r: u32, k: u32| bf16_of(((r * 7 + k * 3) % 11) as f32 - 5.0);
    let b = |c: u32, k: u32| bf16_of(((c * 5 + k * 13) % 9) as f32 - 4.0);
    let layouts = [0, 32, 64, 128].into_iter().flat_map(|span| [Lies::K(span), Lies::Mn(span)]);
    let mut cases: Vec<(Lies, Lies, u32, bool)> = Vec::new();
    for one in layouts {
        cases.push((one, Lies::K(128), 64, false));
        cases.push((Lies::K(128), one, 64, false));
        cases.push((Lies::K(128), one, 64, true));
    }
    for n in [8, 24, 176, 256] {
        cases.push((Lies::K(128), Lies::K(128), n, false));
    }
    for (of_a, of_b, n, registers) in cases {
        // 64-column atoms of an mn-major operand hold whole multiples.
        let mut image = vec![0u8; 60 << 10];
        let (desc_a, transpose_a) = lay(&mut image, 0, of_a, 64, a);
        let (desc_b, transpose_b) = lay(&mut image, 16384, of_b, n, b);
        let words: Vec<u32> =
            image.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
        let d: Vec<String> = (0..n / 2).map(|i| format!("%f{i}")).collect();
        let init: String = d.iter().map(|d| format!("mov.f32 {d}, 0f3F800000;\n")).collect();
        let operand = if registers { "{%r50, %r51, %r52, %r53}".to_string() } else { "%rd30".to_string() };
        let flags = if registers {
            ""
        } else if transpose_a {
            "1, "
        } else {
            "0, "
        };
        // A's registers: row 16 warp + lane / 4 (+ 8), columns 2 (lane % 4) (+ 8), out of a table behind the image.
        let mut table = Vec::new();
        for thread in 0..128 {
            let (warp, lane) = (thread / 32, thread % 32);
            for i in 0..4 {
                let (r, k) = (16 * warp + lane / 4 + 8 * (i % 2), 2 * (lane % 4) + 8 * (i / 2));
                table.push(a(r, k) | a(r, k + 1) << 16);
            }
        }
        let store: String =
            (0..n / 2).map(|i| format!("st.global.f32 [%rd21+{}], %f{i};\n", 512 * i)).collect();
        let body = format!(
            "{}mul.wide.u32 %rd22, %r0, 16;\nadd.s64 %rd23, %rd1, %rd22;\n\
             ld.global.v4.u32 {{%r50, %r51, %r52, %r53}}, [%rd23+61440];\n\
             {init}mov.b64 %rd30, {desc_a};\nmov.b64 %rd31, {desc_b};\nsetp.eq.u32 %p5, 0, 0;\nwgmma.fence.sync.aligned;\n\
             wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{}}}, {operand}, %rd31, %p5, 1, 1, {flags}{};\n\
             wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n\
             mul.wide.u32 %rd20, %r0, 4;\nadd.s64 %rd21, %rd2, %rd20;\n{store}",
            bulk_load(60 << 10),
            d.join(", "),
            transpose_b as u32,
        );
        let from = Buffer::of(&[&words[..], &table[..]].concat());
        let out = Buffer::of(&vec![0; 128 * 128]);
        for seed in 0..2 {
            run_with(&body, 128, &from, &out, None, seed)
                .unwrap_or_else(|f| panic!("{of_a:?} {of_b:?} n {n} registers {registers}: {}", f.text));
        }
        let found = out.words();
        for thread in 0..128 {
            for i in 0..n / 2 {
                let (warp, lane) = (thread / 32, thread % 32);
                let r = 16 * warp + lane / 4 + 8 * (i / 2 % 2);
                let c = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
                let wanted: f32 = 1.0 + (0..16).map(|k| bf16_to(a(r, k)) * bf16_to(b(c, k))).sum::<f32>();
                let found = f32::from_bits(found[(128 * i + thread) as usize]);
                assert_eq!(found, wanted, "{of_a:?} {of_b:?} n {n} registers {registers} row {r} column {c}");
            }
        }
    }
}

#[test]
fn products_of_a_warp_and_matrices_moved() {
    // D = A B^T with both loaded by ldmatrix out of rows of 32 bytes.
    let a = |r: u32, k: u32| bf16_of((r * 3 + k) as f32 % 7.0 - 3.0);
    let b = |c: u32, k: u32| bf16_of((c * 2 + k * 5) as f32 % 5.0 - 2.0);
    let row = |f: &dyn Fn(u32, u32) -> u32, r: u32| {
        (0..8).map(move |k| (r, 2 * k)).map(|(r, k)| f(r, k) | f(r, k + 1) << 16).collect::<Vec<u32>>()
    };
    let mut words: Vec<u32> = (0..16).flat_map(|r| row(&a, r)).collect();
    words.extend((0..8).flat_map(|c| row(&b, c)));
    let body = format!(
        "{}and.b32 %r1, %r0, 15;\nshr.u32 %r2, %r0, 4;\nshl.b32 %r1, %r1, 5;\nshl.b32 %r2, %r2, 4;\nadd.u32 %r3, %r1, %r2;\n\
         add.u32 %r3, %r3, %r10;\nldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r3];\n\
         and.b32 %r1, %r0, 7;\nshr.u32 %r2, %r0, 3;\nand.b32 %r2, %r2, 1;\nshl.b32 %r1, %r1, 5;\nshl.b32 %r2, %r2, 4;\n\
         add.u32 %r3, %r1, %r2;\nadd.u32 %r3, %r3, %r10;\nldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r24, %r25}}, [%r3+512];\n\
         mov.f32 %f1, 0f00000000;\n\
         mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%f2, %f3, %f4, %f5}}, {{%r20, %r21, %r22, %r23}}, {{%r24, %r25}}, {{%f1, %f1, %f1, %f1}};\n\
         mul.wide.u32 %rd20, %r0, 16;\nadd.s64 %rd21, %rd2, %rd20;\nst.global.v4.f32 [%rd21], {{%f2, %f3, %f4, %f5}};\n",
        bulk_load(768)
    );
    let out = empty();
    run(&body, 32, &Buffer::of(&words), &out);
    for lane in 0..32 {
        for i in 0..4 {
            let (r, c) = (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2);
            let wanted: f32 = (0..16).map(|k| bf16_to(a(r, k)) * bf16_to(b(c, k))).sum();
            assert_eq!(f32::from_bits(out.words()[(4 * lane + i) as usize]), wanted, "row {r} column {c}");
        }
    }
}

/// A warpgroup writes A and B by ordinary stores, and multiplies; what stands around the product is the test's.
fn stores_then_product(fence: &str, wait: &str, after: &str) -> String {
    let d: Vec<String> = (0..4).map(|i| format!("%f{i}")).collect();
    format!(
        "mov.u64 %rd10, raw;\ncvt.u32.u64 %r10, %rd10;\nshl.b32 %r1, %r0, 4;\nadd.u32 %r2, %r10, %r1;\n\
         st.shared.v4.u32 [%r2], {{%r0, %r0, %r0, %r0}};\nst.shared.v4.u32 [%r2+2048], {{%r0, %r0, %r0, %r0}};\n{fence}bar.sync 0;\n\
         mov.f32 %f0, 0f00000000;\nmov.f32 %f1, 0f00000000;\nmov.f32 %f2, 0f00000000;\nmov.f32 %f3, 0f00000000;\n\
         mov.b64 %rd30, {};\nsetp.eq.u32 %p5, 0, 0;\nwgmma.fence.sync.aligned;\n\
         wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{}}}, %rd30, %rd30, %p5, 1, 1, 0, 0;\n\
         wgmma.commit_group.sync.aligned;\n{wait}{after}",
        64u64 | 8 << 16 | 16 << 32,
        d.join(", ")
    )
}

const FENCE: &str = "fence.proxy.async.shared::cta;\n";
const WAIT: &str = "wgmma.wait_group.sync.aligned 0;\n";
const USE: &str = "add.f32 %f10, %f0, %f1;\n";

#[test]
fn ordinary_stores_need_a_fence_before_the_tensor_cores() {
    run(&stores_then_product(FENCE, WAIT, USE), 128, &empty(), &empty());
    finds(&stores_then_product("", WAIT, USE), 128, None, &empty(), "without a fence.proxy.async");
}

#[test]
fn accumulators_need_a_wait() {
    finds(
        &stores_then_product(FENCE, "", &format!("{USE}{WAIT}")),
        128,
        None,
        &empty(),
        "before a wgmma.wait_group",
    );
    finds(&stores_then_product(FENCE, "", ""), 128, None, &empty(), "ends with a wgmma in flight");
    let overwrite = format!("mov.f32 %f2, 0f00000000;\n{WAIT}");
    finds(&stores_then_product(FENCE, "", &overwrite), 128, None, &empty(), "writes register");
}

#[test]
fn a_bulk_store_must_have_read_before_the_end() {
    let body = |wait: &str| {
        format!(
            "mov.u64 %rd10, raw;\ncvt.u32.u64 %r10, %rd10;\nsetp.ne.u32 %p1, %r0, 0;\n@%p1 bra END;\nst.shared.u32 [%r10], 7;\n\
             st.shared.u32 [%r10+4], 7;\nst.shared.u32 [%r10+8], 7;\nst.shared.u32 [%r10+12], 7;\nfence.proxy.async.shared::cta;\n\
             cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r10], 16;\ncp.async.bulk.commit_group;\n{wait}END:\n"
        )
    };
    let out = empty();
    run(&body("cp.async.bulk.wait_group.read 0;\n"), 32, &empty(), &out);
    assert_eq!(out.words()[..5], [7, 7, 7, 7, 0]);
    finds(&body(""), 32, None, &empty(), "had not been waited for");
}

#[test]
fn waiting_for_nothing_is_a_deadlock_and_no_hang() {
    let body = "mov.u64 %rd10, raw;\ncvt.u32.u64 %r10, %rd10;\nsetp.ne.u32 %p1, %r0, 0;\n@%p1 bra INIT;\n\
        mbarrier.init.shared::cta.b64 [%r10], 1;\nINIT:\nbar.sync 0;\n\
        WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [%r10], 0;\n@!%p2 bra WAIT;\n";
    finds(body, 64, None, &empty(), "the end of a phase of parity 0 of the barrier at 0x400");
    let half = "setp.ge.u32 %p1, %r0, 32;\n@%p1 bra END;\nbarrier.sync 1, 64;\nEND:\n";
    finds(half, 64, None, &empty(), "named barrier 1 (32 of 64 threads arrived)");
}

#[test]
fn barriers_are_used_as_they_were_made() {
    let wrong_count = "setp.ge.u32 %p1, %r0, 64;\nselp.u32 %r1, 64, 96, %p1;\nbarrier.sync 1, %r1;\n";
    finds(wrong_count, 96, None, &empty(), "before in this round");
    let uninitialised =
        "mov.u64 %rd10, raw;\ncvt.u32.u64 %r10, %rd10;\nmbarrier.arrive.shared::cta.b64 _, [%r10];\n";
    finds(uninitialised, 32, None, &empty(), "no barrier was initialised");
    let too_many = "mov.u64 %rd10, raw;\ncvt.u32.u64 %r10, %rd10;\nsetp.ne.u32 %p1, %r0, 0;\n@%p1 bra INIT;\n\
        mbarrier.init.shared::cta.b64 [%r10], 40;\nINIT:\nbar.sync 0;\nmbarrier.arrive.shared::cta.b64 _, [%r10], 41;\n";
    finds(too_many, 64, None, &empty(), "more arrivals in a phase");
}

#[test]
fn accesses_stay_within_what_is_allocated() {
    let small = Buffer::of(&[1; 32]);
    let beyond = "mul.wide.u32 %rd20, %r0, 4;\nadd.s64 %rd21, %rd1, %rd20;\nld.global.u32 %r1, [%rd21+4];\n";
    finds(beyond, 32, None, &small, "thread 31, line 21 of the PTX: reads 4 bytes at");
    let shared = "mov.u64 %rd10, raw;\ncvt.u32.u64 %r10, %rd10;\nst.shared.u32 [%r10+65536], %r0;\n";
    finds(shared, 32, None, &empty(), "writes 4 bytes of shared memory at 0x10400");
    let crooked = "add.s64 %rd21, %rd1, 4;\nld.global.v2.u32 {%r1, %r2}, [%rd21];\n";
    finds(crooked, 32, None, &empty(), "an access of 8 bytes");
    let parameter = "st.global.u32 [%rd3+128], %r0;\n";
    finds(parameter, 32, None, &empty(), "memory that a kernel may only read");
}

#[test]
fn a_copy_that_nobody_waits_for_is_found() {
    // The value is read without waiting for the barrier: some order must show the poison.
    let body = bulk_load(16);
    let early = body.split("WAIT:").next().unwrap_or_default();
    let text = format!(
        "{early}ld.shared.u32 %r40, [%r10];\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [%r11], 0;\n@!%p2 bra WAIT;\n{STORE}"
    );
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..16 {
        let out = empty();
        run_with(&text, 32, &Buffer::of(&[5; 4]), &out, None, seed).unwrap_or_else(|f| panic!("{}", f.text));
        seen.insert(out.words()[0]);
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [5, u32::MAX], "both orders happen");
}

/// Two CTAs of a warp each: the first loads a line for both, each waits for it, one thread of each then arrives at the first's
/// second barrier. `after` follows, and each stores its line.
fn one_loads_for_two(wait: &str, after: &str) -> String {
    format!(
        "mov.u64 %rd10, raw;\ncvt.u32.u64 %r10, %rd10;\nadd.u32 %r11, %r10, 61440;\nadd.u32 %r12, %r11, 8;\n\
         mov.u32 %r13, %cluster_ctarank;\nsetp.ne.u32 %p1, %r0, 0;\nsetp.ne.u32 %p2, %r13, 0;\n@%p1 bra INIT;\n\
         mbarrier.init.shared::cta.b64 [%r11], 1;\nmbarrier.init.shared::cta.b64 [%r12], 2;\n\
         fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n\
         mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r11], 128;\nINIT:\n{CLUSTER_SYNC}\
         or.pred %p3, %p1, %p2;\n@%p3 bra LOADED;\nmov.u16 %h1, 3;\n\
         cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r10], [%rd1], 128, [%r11], %h1;\n\
         LOADED:\n{wait}shl.b32 %r20, %r0, 2;\nadd.u32 %r20, %r20, %r10;\nld.shared.u32 %r40, [%r20];\n@%p1 bra ARRIVED;\n\
         mov.u32 %r21, 0;\nmapa.shared::cluster.u32 %r22, %r12, %r21;\nmbarrier.arrive.shared::cluster.b64 _, [%r22];\n\
         ARRIVED:\n{after}shl.b32 %r13, %r13, 5;\nadd.u32 %r0, %r0, %r13;\n{STORE}"
    )
}

const CLUSTER_SYNC: &str = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n";
const WAIT_FOR_LINE: &str =
    "LINE:\nmbarrier.try_wait.parity.shared::cta.b64 %p4, [%r11], 0;\n@!%p4 bra LINE;\n";

#[test]
fn a_cluster_shares_loads_and_barriers() {
    let line: Vec<u32> = (100..132).collect();
    // The first CTA waits for the word of both.
    let words = "@%p2 bra BOTH;\nWORDS:\nmbarrier.try_wait.parity.shared::cta.b64 %p5, [%r12], 0;\n@!%p5 bra WORDS;\nBOTH:\n";
    for after in [CLUSTER_SYNC, words] {
        for seed in 0..16 {
            let out = empty();
            run_cluster(
                &one_loads_for_two(WAIT_FOR_LINE, after),
                2,
                32,
                &Buffer::of(&line),
                &out,
                None,
                seed,
            )
            .unwrap_or_else(|fault| panic!("seed {seed}: {}", fault.text));
            assert_eq!(out.words()[..64], [&line[..], &line[..]].concat());
        }
    }
}

#[test]
fn stores_reach_the_other_cta() {
    // Each thread gives its number in the cluster to the one of its place in the other CTA.
    let body = format!(
        "mov.u64 %rd10, raw;\ncvt.u32.u64 %r10, %rd10;\nmov.u32 %r13, %cluster_ctarank;\nshl.b32 %r20, %r0, 2;\n\
         add.u32 %r20, %r20, %r10;\nxor.b32 %r21, %r13, 1;\nmapa.shared::cluster.u32 %r22, %r20, %r21;\n\
         shl.b32 %r13, %r13, 5;\nadd.u32 %r0, %r0, %r13;\n{CLUSTER_SYNC}st.shared::cluster.u32 [%r22], %r0;\n{CLUSTER_SYNC}\
         ld.shared.u32 %r40, [%r20];\n{STORE}"
    );
    for seed in 0..16 {
        let out = empty();
        run_cluster(&body, 2, 32, &empty(), &out, None, seed)
            .unwrap_or_else(|fault| panic!("seed {seed}: {}", fault.text));
        assert_eq!(out.words()[..64], [(32..64).collect::<Vec<u32>>(), (0..32).collect()].concat());
    }
}

#[test]
fn shared_memory_goes_with_its_cta() {
    // A word to a CTA that may have left; a line on its way to one that does not wait.
    let checks = [
        (one_loads_for_two(WAIT_FOR_LINE, ""), "shared memory of CTA [0, 0, 0], which has ended"),
        (one_loads_for_two("", ""), "the CTA ended while a bulk load into its shared memory"),
    ];
    for (body, words) in checks {
        let found = |seed| run_cluster(&body, 2, 32, &Buffer::of(&[7; 32]), &empty(), None, seed).err();
        assert!((0..32).filter_map(found).any(|fault| fault.text.contains(words)), "wanted '{words}'");
    }
}

#[test]
fn maps_are_refused_as_the_driver_does() {
    let encode = |dims: [u64; 2], stride: u64, window: [u32; 2], swizzle: u32, address: u64| {
        TensorMap::encode(9, 2, address, &dims, &[stride], &window, &[1, 1], 0, swizzle, false)
    };
    let kept = encode([64, 10], 128, [64, 8], 3, 0x1000).unwrap();
    assert_eq!(TensorMap::from_words(&kept.to_words()), Some(kept));
    for (why, refused) in [
        ("stride 120", encode([64, 10], 120, [64, 8], 3, 0x1000)),
        ("box of 257", encode([64, 10], 128, [64, 257], 3, 0x1000)),
        ("the swizzle allows 64", encode([64, 10], 128, [64, 8], 2, 0x1000)),
        ("multiples of 16", encode([64, 10], 128, [4, 8], 3, 0x1000)),
        ("address", encode([64, 10], 128, [64, 8], 3, 0x1008)),
    ] {
        let text = refused.expect_err(why);
        assert!(text.contains(why), "{text}");
    }
}
