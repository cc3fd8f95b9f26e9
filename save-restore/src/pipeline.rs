//! Parallel preparation, one ordered consumer.
//!
//! Items are prepared a window at a time on a thread pool while the calling thread
//! consumes the window before, in order: what is consumed is the same for one thread
//! and for many.

use std::num::NonZeroUsize;

use rayon::iter::{IntoParallelIterator, ParallelIterator};

/// Items that are prepared while as many others are being consumed: bounds what is
/// in flight to twice this, and the threads that have work.
pub(crate) const WINDOW: usize = 4;

/// How many threads to work with: what was asked for, or what the machine has.
pub(crate) fn threads(asked: Option<NonZeroUsize>) -> NonZeroUsize {
    asked
        .or_else(|| std::thread::available_parallelism().ok())
        .unwrap_or(NonZeroUsize::MIN)
}

/// Threads beside this one, at most `most`; `None` where this one is to do all the work.
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

/// Prepare each of `items` on `threads` − 1 threads (at most [`WINDOW`]) and consume the results on this
/// one, in order. With one thread everything happens here.
///
/// # Errors
///
/// The first failure in the order of the items; nothing behind it is consumed.
pub(crate) fn ordered<I, T, E>(
    threads: NonZeroUsize,
    items: impl IntoIterator<Item = I>,
    prepare: impl Fn(I) -> Result<T, E> + Sync,
    mut consume: impl FnMut(T) -> Result<(), E>,
) -> Result<(), E>
where
    I: Send,
    T: Send,
    E: Send,
{
    let mut items = items.into_iter();
    let Some(pool) = pool(threads, WINDOW) else {
        return items.try_for_each(|item| consume(prepare(item)?));
    };
    let mut ready: Vec<Result<T, E>> = Vec::new();
    loop {
        let window: Vec<I> = items.by_ref().take(WINDOW).collect();
        let last = window.is_empty();
        let mut next = Vec::new();
        let prepare = &prepare;
        pool.in_place_scope(|scope| {
            if !last {
                scope.spawn(|_| next = window.into_par_iter().map(prepare).collect());
            }
            ready.drain(..).try_for_each(|item| consume(item?))
        })?;
        if last {
            return Ok(());
        }
        ready = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(threads: usize, items: u32, bad: Option<u32>) -> (Vec<u32>, Result<(), u32>) {
        let mut out = Vec::new();
        let result = ordered(
            NonZeroUsize::new(threads).unwrap(),
            0..items,
            |i| if Some(i) == bad { Err(i) } else { Ok(i) },
            |i| {
                out.push(i);
                Ok(())
            },
        );
        (out, result)
    }

    #[test]
    fn order_is_that_of_the_items() {
        for threads in [1, 2, 5] {
            for items in [0, 1, 3, 4, 5, 100] {
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
    fn a_consumer_that_fails_ends_it() {
        let mut seen = 0;
        let result = ordered(NonZeroUsize::new(2).unwrap(), 0..100, Ok, |i: u32| {
            seen += 1;
            if i == 9 { Err("full") } else { Ok(()) }
        });
        assert_eq!(result, Err("full"));
        assert_eq!(seen, 10);
    }
}
