use dsv_runtime::{Device, Error, Notice, Options, Runtime, decode_error_flag};
use dsv_spec::params::error_bits;

#[test]
fn a_missing_driver_is_a_clean_error() {
    assert_eq!(
        Error::NoDriver.to_string(),
        "no CUDA driver: libcuda.so.1 was not found on this machine\n  needed: an NVIDIA GPU with its driver, 580 or \
         newer\n  to see whether there is one: nvidia-smi\n  without a GPU every op runs on the CPU in dsv-reference: \
         cargo test --release -p dsv-reference"
    );
    // No machine has a GPU of this ordinal; without a driver it must be said, not panicked.
    let far = usize::MAX;
    for error in
        [Device::open(far).err(), Runtime::open(Options { ordinal: far, ..Options::default() }).err()]
    {
        match error {
            Some(Error::NoDriver) => {}
            Some(Error::NoSuchGpu { ordinal, .. }) => assert_eq!(ordinal, far),
            // A driver without any GPU, or a stub of one, refuses to initialise.
            Some(Error::Driver { call, .. }) => assert_eq!(call, "cuInit"),
            other => panic!("opening GPU {far} gave {other:?}"),
        }
    }
}

#[test]
fn a_missing_gpu_names_those_there_are() {
    let text = |ordinal, count| Error::NoSuchGpu { ordinal, count }.to_string();
    assert!(text(8, 8).starts_with("GPU 8 does not exist: the driver shows 8\n  allowed: 0 to 7\n"));
    assert!(text(1, 1).contains("allowed: 0\n"));
    assert!(text(0, 0).contains("allowed: none\n"));
    assert!(text(0, 0).contains("nvidia-smi -L"));
    let old = Error::OldDriver { cuda_version: 12_040 }.to_string();
    assert!(old.starts_with("the driver serves CUDA 12.4 only\n  needed: 12.8, driver 570"), "{old}");
}

#[test]
fn driver_errors_carry_the_next_command() {
    let error = |code| {
        let (name, text) = ("NAME".to_string(), "words".to_string());
        Error::Driver { call: "cuModuleLoadData of x".to_string(), code, name, text }.to_string()
    };
    assert_eq!(error(1), "cuModuleLoadData of x: NAME (1): words");
    assert!(error(209).contains("dsv-codegen build"));
    assert!(error(700).contains("compute-sanitizer"));
    assert!(error(2).contains("nvidia-smi"));
}

#[test]
fn every_bit_of_the_flag_is_explained() {
    assert_eq!(decode_error_flag(0), Ok(()));
    let bits = [
        (error_bits::INDEX_OUT_OF_RANGE, "outside the sequence"),
        (error_bits::COUNT_OUT_OF_RANGE, "a count"),
        (error_bits::LIST_NOT_ASCENDING, "ascending and unique"),
        (error_bits::SCORE_IS_NAN, "NaN"),
        (error_bits::TOP_K_OUT_OF_RANGE, "top-k"),
    ];
    for (bit, word) in bits {
        let error = decode_error_flag(bit).unwrap_err();
        assert_eq!(error.problems.len(), 1, "{error}");
        assert!(error.problems[0].contains(word), "{error}");
    }
    let all = bits.iter().fold(0, |all, (bit, _)| all | bit);
    assert_eq!(decode_error_flag(all).unwrap_err().problems.len(), bits.len());
    let poisoned = decode_error_flag(-1).unwrap_err();
    assert_eq!(poisoned.problems.len(), bits.len() + 1);
    assert!(poisoned.to_string().contains("not set to 0"), "{poisoned}");
}

/// A text of every error and notice, so that a change of one is seen.
#[test]
fn every_text() {
    let dir = || "cubins".into();
    let errors = [
        Error::NoDriver,
        Error::OldDriver { cuda_version: 12_040 },
        Error::NoSuchGpu { ordinal: 3, count: 2 },
        Error::UnsupportedGpu { gpu: "NVIDIA V100".into(), capability: (7, 0) },
        Error::Driver {
            call: "cuMemAlloc of 1024 bytes".into(),
            code: 2,
            name: "CUDA_ERROR_OUT_OF_MEMORY".into(),
            text: "out of memory".into(),
        },
        Error::Architecture { arch: dsv_spec::Arch::Sm90a, gpu: "NVIDIA L40".into(), capability: (8, 9) },
        Error::NoText { name: "kv_invert_sm90a".into(), arch: dsv_spec::Arch::Sm90a },
        Error::Bundle { dir: dir(), problems: vec!["manifest.json: missing".into(), "another".into()] },
        Error::Compile {
            name: "kv_invert_sm90a".into(),
            source: Box::new(dsv_compile::CompileError::NoNvrtc {
                tried: vec!["here".into(), "there".into()],
            }),
        },
        Error::Plan { what: "attn_fwd".into(), problems: vec!["batch 0; allowed: 1 to 65535".into()] },
        Error::Argument {
            kernel: "attn_fwd".into(),
            what: "address of q",
            value: "0x8".into(),
            allowed: "multiples of 16".into(),
        },
    ];
    let table = dsv_spec::TableError { origin: "t.json".into(), problems: vec!["it is not a table".into()] };
    let notices = [
        Notice::TableRefused(table),
        Notice::NoTable { gpu: "NVIDIA B200".into(), available: vec!["NVIDIA H200".into()] },
        Notice::NoTable { gpu: "NVIDIA B200".into(), available: Vec::new() },
        Notice::BundleRefused(errors[6].to_string()),
        Notice::CompilingHere { kernel: "kv_invert_sm90a".into(), compiler: "13.0.88".into(), bundle: None },
        Notice::CompilingHere {
            kernel: "kv_invert_sm90a".into(),
            compiler: "13.0.88".into(),
            bundle: Some(dir()),
        },
        Notice::CompilerComplains {
            kernel: "attn_bwd".into(),
            compiler: "12.9.86".into(),
            spilled: 16,
            notes: vec!["(C7511) wgmma serialised".into()],
        },
    ];
    let mut texts: Vec<String> = errors.iter().map(Error::to_string).collect();
    texts.extend(notices.iter().map(Notice::to_string));
    texts.push(decode_error_flag(-1).unwrap_err().to_string());
    insta::assert_snapshot!(texts.join("\n\n"));
}
