use dsv_runtime::{Device, Error, Options, Runtime, decode_error_flag};
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
