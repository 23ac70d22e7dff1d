//! Items made ahead of their use by several threads, and handed out in order.
//!
//! Item `i` is made by thread `i % readers`, which has up to `depth` finished ones waiting: the order, and so a run's
//! bits, do not depend on the threads.

use std::sync::mpsc::{Receiver, sync_channel};

/// The items of [`ahead`], in order.
pub struct Items<T> {
    queues: Vec<Receiver<T>>,
    next: usize,
}

impl<T> Iterator for Items<T> {
    type Item = T;

    /// Waits for the next item; `None` after the last.
    fn next(&mut self) -> Option<T> {
        let item = self.queues[self.next].recv().ok()?;
        self.next = (self.next + 1) % self.queues.len();
        Some(item)
    }
}

/// Makes items `0..count` on `readers` threads, each up to `depth` (and the one in its hands) ahead of `consume`, which
/// gets them in order. Threads end with their last item, with the first that `ends` says nothing comes after, or when
/// `consume` returns.
///
/// # Panics
/// If `readers` or `depth` is 0, or when `make` panics.
pub fn ahead<T: Send, R>(
    [readers, depth]: [usize; 2],
    count: u64,
    make: impl Fn(u64) -> T + Sync,
    ends: impl Fn(&T) -> bool + Sync,
    consume: impl FnOnce(Items<T>) -> R,
) -> R {
    assert!(readers > 0 && depth > 0, "{readers} readers, {depth} items each");
    let (make, ends) = (&make, &ends);
    std::thread::scope(|scope| {
        let queues = (0..readers as u64).map(|first| {
            let (send, receive) = sync_channel(depth);
            scope.spawn(move || {
                for i in (first..count).step_by(readers) {
                    let item = make(i);
                    let last = ends(&item);
                    if send.send(item).is_err() || last {
                        return;
                    }
                }
            });
            receive
        });
        consume(Items { queues: queues.collect(), next: 0 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    #[test]
    fn order_does_not_depend_on_threads_nor_on_who_is_slow() {
        for readers in [1, 2, 3, 7] {
            let make = |i: u64| {
                std::thread::sleep(Duration::from_micros(if i.is_multiple_of(3) { 900 } else { 10 }));
                i
            };
            let got: Vec<u64> = ahead([readers, 2], 20, make, |_| false, |items| items.collect());
            assert_eq!(got, (0..20).collect::<Vec<_>>(), "{readers} readers");
        }
    }

    #[test]
    fn no_more_is_made_than_is_asked_for() {
        let made = AtomicU64::new(0);
        let make = |i: u64| {
            made.fetch_add(1, Ordering::SeqCst);
            i
        };
        // Three threads, two waiting items each and one in hand; taking five lets at most five more begin.
        let first: Vec<u64> = ahead([3, 2], 1000, make, |_| false, |items| items.take(5).collect());
        assert_eq!(first, [0, 1, 2, 3, 4]);
        assert!(made.load(Ordering::SeqCst) <= 5 + 3 * 3, "{made:?} made");
    }

    #[test]
    fn an_error_comes_in_its_place_and_ends_the_items() {
        let make = |i: u64| if i == 4 { Err(i) } else { Ok(i) };
        let got: Vec<Result<u64, u64>> = ahead([2, 1], 100, make, Result::is_err, |mut items| {
            let upto = items.by_ref().take(5).collect();
            assert!(items.nth(1).is_none(), "its thread has ended");
            upto
        });
        assert_eq!(got, [Ok(0), Ok(1), Ok(2), Ok(3), Err(4)]);
    }
}
