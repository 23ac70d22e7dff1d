use crate::registry;
use dsv_compile::{BundledKernel, Compiled, ResourceReport, write_bundle};
use dsv_runtime::{Bundle, Error, Notice, Registry, Report};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// A bundle of the registry's first three kernels with made-up cubins.
fn write(dir: &Path, registry: &Registry, source_hash: impl Fn(usize, &str) -> String) -> Vec<String> {
    let kernels = registry.kernels[..3]
        .iter()
        .enumerate()
        .map(|(i, text)| {
            let compiled = Compiled {
                name: text.name.to_string(),
                cubin: format!("cubin of {}", text.name).into_bytes(),
                report: ResourceReport::default(),
                entries: Default::default(),
                log: String::new(),
                notes: Vec::new(),
                warnings: Vec::new(),
                compiler: "13.0.88".to_string(),
                cached: false,
                source_path: Default::default(),
            };
            BundledKernel::new(&compiled, "sm90a", &source_hash(i, text.source_hash), 0)
        })
        .collect();
    write_bundle(dir, "13.0.88", kernels).unwrap();
    registry.kernels[..3].iter().map(|k| k.name.to_string()).collect()
}

fn same(_: usize, hash: &str) -> String {
    hash.to_string()
}

fn problems(result: Result<Bundle, Error>) -> Vec<String> {
    let error = result.expect_err("the bundle was accepted");
    assert!(error.to_string().contains("dsv-codegen build --out"), "{error}");
    match error {
        Error::Bundle { problems, .. } => problems,
        other => panic!("{other}"),
    }
}

#[test]
fn a_good_bundle_opens_and_is_checked_against_gpu_and_driver() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(&[]);
    write(dir.path(), &registry, same);
    let bundle = Bundle::open(dir.path(), &registry).unwrap();
    assert_eq!((bundle.dir(), bundle.compiler()), (dir.path(), "13.0.88"));
    bundle.check_gpu((9, 0), 580).unwrap();
    let found = problems(bundle.check_gpu((8, 0), 535).map(|()| bundle.clone()));
    assert_eq!(found.len(), 2, "{found:#?}");
    assert!(found[0].contains("sm90a") && found[0].contains("8.0"), "{}", found[0]);
    assert!(found[1].contains("driver 580") && found[1].contains("535"), "{}", found[1]);
}

#[test]
fn no_manifest_or_a_cut_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(&[]);
    assert!(problems(Bundle::open(dir.path(), &registry))[0].contains("manifest.json"));
    write(dir.path(), &registry, same);
    let path = dir.path().join("manifest.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, &text[..text.len() / 2]).unwrap();
    assert!(problems(Bundle::open(dir.path(), &registry))[0].contains("not a manifest"));
    std::fs::write(&path, text.replace("\"schema\": 1", "\"schema\": 7")).unwrap();
    assert!(problems(Bundle::open(dir.path(), &registry))[0].contains("schema 7"));
}

#[test]
fn every_stale_missing_or_damaged_cubin_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(&[]);
    let names =
        write(dir.path(), &registry, |i, hash| if i == 0 { "0123456789abcdef".into() } else { hash.into() });
    std::fs::remove_file(dir.path().join(format!("{}.cubin", names[1]))).unwrap();
    std::fs::write(dir.path().join(format!("{}.cubin", names[2])), "another").unwrap();
    let found = problems(Bundle::open(dir.path(), &registry));
    assert_eq!(found.len(), 3, "{found:#?}");
    assert!(found[0].contains(&names[0]) && found[0].contains("0123456789ab"), "{}", found[0]);
    assert!(found[1].contains(&names[1]), "{}", found[1]);
    assert!(found[2].contains(&names[2]) && found[2].contains("manifest"), "{}", found[2]);
}

#[test]
fn a_foreign_bundle_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let known = registry(&[]);
    write(dir.path(), &known, same);
    let other = Registry { kernels: &known.kernels[3..], ..known };
    assert_eq!(problems(Bundle::open(dir.path(), &other)), ["it holds no kernel that this version has"]);
}

#[test]
fn a_bundle_that_cannot_be_loaded_is_said_once_and_kernels_are_compiled_instead() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(&[]);
    let said: Arc<Mutex<Vec<Notice>>> = Arc::default();
    let report: Report = {
        let said = said.clone();
        Arc::new(move |notice| said.lock().unwrap().push(notice.clone()))
    };
    let usable = |driver| Bundle::usable(dir.path(), &registry, (9, 0), driver, &report).is_some();
    assert!(!usable(580), "an empty directory");
    write(dir.path(), &registry, same);
    assert!(!usable(550), "a driver older than the cubins' compiler");
    assert!(usable(580));
    let texts: Vec<String> = said.lock().unwrap().iter().map(Notice::to_string).collect();
    assert_eq!(texts.len(), 2, "{texts:#?}");
    for (text, why) in texts.iter().zip(["manifest.json", "need driver 580 or newer, this one is 550"]) {
        assert!(text.starts_with("WARNING: compiling kernels on this machine instead: "), "{text}");
        assert!(text.contains(why) && text.contains("dsv-codegen build --out"), "{text}");
    }
}
