//! Parallel preparation, one ordered consumer.
//!
//! Items are prepared on a thread pool while the calling thread consumes those that are ready, in
//! order. The result does not depend on the number of threads. The queue between them is bounded.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};

/// The most items in flight: being prepared, ready, or being consumed. More threads than this would
/// have no work.
pub(crate) const IN_FLIGHT: usize = 8;

/// Items in flight for this many preparing threads: for each thread one in work and one ready, plus
/// one being consumed and one that has been. More items were not faster, and each keeps a batch of
/// the guest's pages mapped.
fn in_flight(preparing: usize) -> usize {
    (2 * preparing + 2).min(IN_FLIGHT)
}

/// The number of threads to use: as requested, or as many as the machine has.
pub(crate) fn threads(asked: Option<NonZeroUsize>) -> NonZeroUsize {
    asked
        .or_else(|| std::thread::available_parallelism().ok())
        .unwrap_or(NonZeroUsize::MIN)
}

/// Threads besides this one, at most `most`; `None` if this one does all the work.
pub(crate) fn pool(threads: NonZeroUsize, most: usize) -> Option<rayon::ThreadPool> {
    if threads.get() == 1 {
        return None;
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads((threads.get() - 1).min(most))
        .thread_name(|i| format!("xsr-pages-{i}"))
        .build()
        .inspect_err(|error| tracing::warn!(%error, "no thread pool; going on with one thread"))
        .ok()
}

/// Prepares each of `items` on `pool` and consumes the results on this thread, in order. At most
/// [`IN_FLIGHT`] items are taken from `items` and not consumed yet (fewer if few threads prepare).
/// Consumed items are dropped on the pool, before the next one is prepared. Without a pool
/// everything happens on this thread, one item after the other.
///
/// # Errors
///
/// The first failure in the order of the items; nothing after it is consumed.
///
/// # Panics
///
/// When `prepare` or `consume` panics, after all preparation has stopped.
pub(crate) fn ordered<I, T, E>(
    pool: Option<&rayon::ThreadPool>,
    items: impl IntoIterator<Item = I>,
    prepare: impl Fn(I) -> Result<T, E> + Sync,
    mut consume: impl FnMut(&T) -> Result<(), E>,
) -> Result<(), E>
where
    I: Send,
    T: Send,
    E: Send,
{
    let mut items = items.into_iter();
    let Some(pool) = pool else {
        return items.try_for_each(|item| consume(&prepare(item)?));
    };
    let most = in_flight(pool.current_num_threads());
    // Items that wait after a failure are not begun.
    let failed = AtomicBool::new(false);
    // Consumed but not dropped yet.
    let spent: Mutex<Vec<T>> = Mutex::default();
    let (prepare, failed, spent) = (&prepare, &failed, &spent);
    pool.in_place_scope_fifo(|scope| {
        let mut queue = VecDeque::with_capacity(most);
        loop {
            for item in items.by_ref().take(most - queue.len()) {
                let (done, ready) = mpsc::sync_channel(1);
                queue.push_back(ready);
                scope.spawn_fifo(move |_| {
                    if failed.load(Ordering::Relaxed) {
                        return;
                    }
                    drop(take(spent));
                    // Refused if the consumer has failed meanwhile and no longer needs it.
                    done.send(prepare(item)).ok();
                });
            }
            let Some(ready) = queue.pop_front() else {
                return Ok(());
            };
            let Ok(item) = ready.recv() else {
                // Its preparation panicked; the scope passes the panic on when it ends.
                failed.store(true, Ordering::Relaxed);
                return Ok(());
            };
            let consumed = item.and_then(|item| {
                consume(&item)?;
                lock(spent).push(item);
                Ok(())
            });
            if let Err(error) = consumed {
                failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
    })
}

/// As [`ordered`], with a third step: `place` decides on this thread, in order, what to do with an
/// item, and `write` does it on `pool`, in any order. When this returns, everything has been done.
///
/// # Errors
///
/// One of the failures. Items after one that could not be prepared or placed are not written; all
/// items before it are.
///
/// # Panics
///
/// When one of the three panics, after all preparation and writing has stopped.
pub(crate) fn placed<I, T, P, E>(
    pool: Option<&rayon::ThreadPool>,
    items: impl IntoIterator<Item = I>,
    prepare: impl Fn(I) -> Result<T, E> + Sync,
    mut place: impl FnMut(&T) -> Result<P, E>,
    write: impl Fn(&T, P) -> Result<(), E> + Sync,
) -> Result<(), E>
where
    I: Send,
    T: Send,
    P: Send,
    E: Send,
{
    let mut items = items.into_iter();
    let Some(pool) = pool else {
        return items.try_for_each(|item| {
            let item = prepare(item)?;
            let place = place(&item)?;
            write(&item, place)
        });
    };
    let most = in_flight(pool.current_num_threads());
    let failed = AtomicBool::new(false);
    let (prepare, write, failed) = (&prepare, &write, &failed);
    pool.in_place_scope_fifo(|scope| {
        let mut prepared = VecDeque::with_capacity(most);
        let mut written: VecDeque<mpsc::Receiver<Result<(), E>>> = VecDeque::with_capacity(most);
        let mut run = || -> Result<bool, E> {
            loop {
                while let Some(first) = written.front() {
                    match first.try_recv() {
                        Ok(result) => result?,
                        Err(mpsc::TryRecvError::Empty) => break,
                        // It panicked; the scope passes the panic on when it ends.
                        Err(mpsc::TryRecvError::Disconnected) => return Ok(false),
                    }
                    written.pop_front();
                }
                let room = most.saturating_sub(prepared.len() + written.len());
                for item in items.by_ref().take(room) {
                    let (done, ready) = mpsc::sync_channel(1);
                    prepared.push_back(ready);
                    scope.spawn_fifo(move |_| {
                        if !failed.load(Ordering::Relaxed) {
                            done.send(prepare(item)).ok();
                        }
                    });
                }
                let Some(ready) = prepared.pop_front() else {
                    match written.pop_front().map(|first| first.recv()) {
                        None => return Ok(true),
                        Some(Ok(result)) => result?,
                        Some(Err(mpsc::RecvError)) => return Ok(false),
                    }
                    continue;
                };
                let Ok(item) = ready.recv() else {
                    return Ok(false);
                };
                let item = item?;
                let place = place(&item)?;
                let (done, ready) = mpsc::sync_channel(1);
                written.push_back(ready);
                scope.spawn_fifo(move |_| {
                    done.send(write(&item, place)).ok();
                });
            }
        };
        let result = run();
        failed.store(!matches!(result, Ok(true)), Ordering::Relaxed);
        result.map(drop)
    })
}

fn lock<T>(list: &Mutex<Vec<T>>) -> MutexGuard<'_, Vec<T>> {
    // Every change of the list is a single step.
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

fn take<T>(list: &Mutex<Vec<T>>) -> Vec<T> {
    std::mem::take(&mut *lock(list))
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::AtomicUsize;

    use super::*;

    fn pool_of(threads: usize) -> Option<rayon::ThreadPool> {
        pool(NonZeroUsize::new(threads).unwrap(), IN_FLIGHT)
    }

    fn run(threads: usize, items: u32, bad: Option<u32>) -> (Vec<u32>, Result<(), u32>) {
        let mut out = Vec::new();
        let result = ordered(
            pool_of(threads).as_ref(),
            0..items,
            |i| if Some(i) == bad { Err(i) } else { Ok(i) },
            |i| {
                out.push(*i);
                Ok(())
            },
        );
        (out, result)
    }

    #[test]
    fn order_is_that_of_the_items() {
        for threads in [1, 2, 5, 16] {
            for items in [0, 1, 7, 8, 9, 100] {
                let (out, result) = run(threads, items, None);
                assert_eq!(result, Ok(()));
                assert_eq!(out, (0..items).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn nothing_behind_a_failure_is_consumed() {
        for threads in [1, 3] {
            let (out, result) = run(threads, 50, Some(17));
            assert_eq!(result, Err(17));
            assert_eq!(out, (0..17).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_first_failure_in_order_is_told_though_a_later_one_came_before() {
        let (later, came) = mpsc::channel();
        let (later, came) = (std::sync::Mutex::new(later), std::sync::Mutex::new(came));
        let result = ordered(
            pool_of(3).as_ref(),
            0..2,
            |i| {
                if i == 0 {
                    came.lock().unwrap().recv().unwrap();
                } else {
                    later.lock().unwrap().send(()).unwrap();
                }
                Err::<(), u32>(i)
            },
            |()| Ok(()),
        );
        assert_eq!(result, Err(0));
    }

    #[test]
    fn a_consumer_that_fails_ends_it() {
        let mut seen = 0;
        let result = ordered(pool_of(2).as_ref(), 0..100, Ok, |i: &u32| {
            seen += 1;
            if *i == 9 { Err("full") } else { Ok(()) }
        });
        assert_eq!(result, Err("full"));
        assert_eq!(seen, 10);
    }

    #[test]
    fn what_is_in_flight_is_bounded_and_the_bound_is_reached() {
        for (threads, bound) in [(2, 4), (3, 6), (4, IN_FLIGHT), (16, IN_FLIGHT)] {
            let (taken, consumed, most) = (AtomicUsize::new(0), AtomicUsize::new(0), &mut 0);
            let items = (0..100).inspect(|_| {
                let taken = taken.fetch_add(1, Ordering::Relaxed) + 1;
                *most = (*most).max(taken - consumed.load(Ordering::Relaxed));
            });
            let consume = |_: &i32| {
                consumed.fetch_add(1, Ordering::Relaxed);
                Ok::<(), ()>(())
            };
            assert_eq!(
                ordered(pool_of(threads).as_ref(), items, Ok, consume),
                Ok(())
            );
            assert_eq!(*most, bound, "{threads} threads");
        }
    }

    #[test]
    fn places_are_given_in_order_and_all_is_written() {
        for threads in [1, 2, 5, 16] {
            for items in [0_u32, 1, 7, 8, 9, 100] {
                let (mut order, written) = (Vec::new(), Mutex::new(Vec::new()));
                let result = placed(
                    pool_of(threads).as_ref(),
                    0..items,
                    Ok::<u32, ()>,
                    |i| {
                        order.push(*i);
                        Ok(2 * *i)
                    },
                    |i, place| {
                        lock(&written).push((*i, place));
                        Ok(())
                    },
                );
                assert_eq!(result, Ok(()));
                assert!(order.iter().copied().eq(0..items));
                let mut written = take(&written);
                written.sort_unstable();
                assert!(written.into_iter().eq((0..items).map(|i| (i, 2 * i))));
            }
        }
    }

    #[test]
    fn a_failure_of_any_step_ends_it_and_a_panic_is_passed_on() {
        for threads in [1, 3] {
            for step in 0..3 {
                let fails = |at: u32, i: u32| match at == step && i == 30 {
                    true => Err(at),
                    false => Ok(()),
                };
                let result = placed(
                    pool_of(threads).as_ref(),
                    0..100,
                    |i| fails(0, i).map(|()| i),
                    |i| fails(1, *i),
                    |i, ()| fails(2, *i),
                );
                assert_eq!(result, Err(step), "{threads} threads");
                let panicked = catch_unwind(AssertUnwindSafe(|| {
                    let panics = |at, i| assert!(fails(at, i).is_ok(), "as asked");
                    placed(
                        pool_of(threads).as_ref(),
                        0..100,
                        |i| {
                            panics(0, i);
                            Ok::<u32, ()>(i)
                        },
                        |i| {
                            panics(1, *i);
                            Ok(())
                        },
                        |i, ()| {
                            panics(2, *i);
                            Ok(())
                        },
                    )
                }));
                assert!(panicked.is_err(), "step {step}, {threads} threads");
            }
        }
    }

    #[test]
    fn what_is_consumed_is_dropped_by_those_who_prepare_and_all_of_it() {
        struct Item<'a>(&'a Mutex<Vec<std::thread::ThreadId>>);
        impl Drop for Item<'_> {
            fn drop(&mut self) {
                lock(self.0).push(std::thread::current().id());
            }
        }
        let dropped = Mutex::default();
        let prepare = |_| Ok::<_, ()>(Item(&dropped));
        assert_eq!(
            ordered(pool_of(2).as_ref(), 0..100, prepare, |_| Ok(())),
            Ok(())
        );
        let dropped = take(&dropped);
        let here = std::thread::current().id();
        let late = dropped.iter().filter(|thread| **thread == here).count();
        assert_eq!(dropped.len(), 100);
        assert!(late <= IN_FLIGHT, "{late} dropped by the consumer");
    }

    #[test]
    fn a_panic_on_either_side_is_passed_on_and_the_pool_remains_of_use() {
        let pool = pool_of(3);
        for in_prepare in [true, false] {
            let panicked = catch_unwind(AssertUnwindSafe(|| {
                let at_20 = |here: bool, i: u32| {
                    assert!(!(here && i == 20), "as asked");
                    Ok::<u32, ()>(i)
                };
                let consume = |i: &u32| at_20(!in_prepare, *i).map(drop);
                ordered(pool.as_ref(), 0..50, |i| at_20(in_prepare, i), consume)
            }));
            assert!(panicked.is_err(), "in_prepare: {in_prepare}");
        }
        assert_eq!(
            ordered(pool.as_ref(), 0..50, Ok::<u32, ()>, |_| Ok(())),
            Ok(())
        );
    }
}
