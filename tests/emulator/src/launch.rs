//! A launch: its clusters on the machine's cores, the first fault ends it.

use crate::block::{Block, Fault, LAUNCH_FAILED, Launch};
use crate::decode::Kernel;
use crate::memory::{Region, Regions};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Dynamic shared memory a CTA may have, with its static one, bytes.
pub(crate) const SHARED_LIMIT: u32 = 227 * 1024;
/// What the device says it has: few, so that CTAs that stay take several tiles of a small test.
pub(crate) const MULTIPROCESSORS: u32 = 3;

/// A kernel and how it is launched.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) cluster: [u32; 3],
    pub(crate) dynamic_shared: u32,
}

/// Runs a kernel to its end. `memory` are the allocations; `params` the bytes of its parameters, in order.
///
/// # Errors
/// A shape the device does not launch, or what a CTA did that it must not.
pub(crate) fn launch(
    kernel: &Kernel,
    shape: &Shape,
    params: &[u8],
    memory: &[Region],
    seed: u64,
) -> Result<(), Fault> {
    let threads: u64 = shape.block.iter().map(|&n| n as u64).product();
    let invalid = |text: String| Err(Fault::new(1, format!("{}: {text}", kernel.name)));
    if threads == 0 || threads > 1024 || kernel.max_threads > 0 && threads > kernel.max_threads as u64 {
        return invalid(format!("{threads} threads; allowed: 1 to {}", kernel.max_threads.clamp(1, 1024)));
    }
    if shape.grid.contains(&0) || shape.grid[1] > 65_535 || shape.grid[2] > 65_535 {
        return invalid(format!("a grid of {:?}", shape.grid));
    }
    let cluster: u32 = shape.cluster.iter().product();
    if cluster == 0 || cluster > 8 || (0..3).any(|i| !shape.grid[i].is_multiple_of(shape.cluster[i])) {
        return invalid(format!("clusters of {:?} in a grid of {:?}", shape.cluster, shape.grid));
    }
    #[cfg(target_arch = "x86_64")]
    if !std::arch::is_x86_feature_detected!("avx2") || !std::arch::is_x86_feature_detected!("fma") {
        return Err(Fault::new(LAUNCH_FAILED, "the emulator needs a processor with AVX2 and FMA"));
    }
    if kernel.static_shared + shape.dynamic_shared > SHARED_LIMIT {
        return invalid(format!("{} bytes of shared memory", kernel.static_shared + shape.dynamic_shared));
    }
    for (word, bytes) in params.chunks(8).enumerate() {
        let mut value = [0; 8];
        value[..bytes.len()].copy_from_slice(bytes);
        let at = (kernel.params_at() - kernel.params.as_ptr() as u64) as usize / 8;
        kernel.params[at + word].store(u64::from_le_bytes(value), Ordering::Relaxed);
    }
    let mut regions = memory.to_vec();
    let at = kernel.params_at();
    regions.push(Region { start: at, end: at + kernel.params_bytes as u64, writable: false });
    for (data, bytes) in &kernel.globals {
        let start = data.as_ptr() as u64;
        regions.push(Region { start, end: start + (*bytes).max(1) as u64, writable: true });
    }
    let regions = Regions::new(regions);
    let launch = Launch {
        kernel,
        grid: shape.grid,
        block: shape.block,
        cluster: shape.cluster,
        dynamic_shared: shape.dynamic_shared,
        regions: &regions,
        seed,
        multiprocessors: MULTIPROCESSORS,
    };
    let clusters = shape.grid.iter().map(|&n| n as u64).product::<u64>() / cluster as u64;
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let fault: Mutex<Option<Fault>> = Mutex::new(None);
    let work = || {
        let mut block = Block::new(&launch);
        while !stop.load(Ordering::Relaxed) {
            let cluster = next.fetch_add(1, Ordering::Relaxed);
            if cluster >= clusters {
                return;
            }
            if let Err(found) = block.run(cluster) {
                stop.store(true, Ordering::Relaxed);
                fault.lock().unwrap_or_else(|p| p.into_inner()).get_or_insert(found);
            }
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u64).min(clusters);
    if cores <= 1 {
        work();
    } else {
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
            for worker in workers {
                if worker.join().is_err() {
                    let text = format!("{}: the emulator itself failed; its message is above", kernel.name);
                    fault
                        .lock()
                        .unwrap_or_else(|p| p.into_inner())
                        .get_or_insert(Fault::new(LAUNCH_FAILED, text));
                }
            }
        });
    }
    match fault.into_inner().unwrap_or_else(|p| p.into_inner()) {
        None => Ok(()),
        Some(fault) => Err(fault),
    }
}
