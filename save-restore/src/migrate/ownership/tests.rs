//! Exhaustive search of every state that two machines, two hosts and the connection between them
//! can reach, breadth first, so that a fault is found with a shortest path to it.
//!
//! The search is our own: states of a few bytes and thirty lines of code do not need a model
//! checker, which would be a large dependency.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;

mod admission;
mod plain;
mod protect;

/// A broken rule, and the path to the state that breaks it.
#[derive(Debug)]
struct Found {
    why: String,
    #[expect(dead_code, reason = "a test that fails prints it")]
    way: Vec<String>,
}

/// Visits all states that `next` leads to, and calls `check` for each; `next` returns no state once
/// all is over. Returns the final states.
fn explore<W: Clone + Eq + Hash + Debug>(
    starts: Vec<W>,
    next: impl Fn(&W) -> Vec<(&'static str, W)>,
    check: impl Fn(&W, bool) -> Result<(), String>,
) -> Result<(usize, Vec<W>), Found> {
    let mut known: HashMap<W, usize> = HashMap::new();
    let mut states: Vec<(W, Option<(usize, &'static str)>)> = Vec::new();
    for start in starts {
        known.insert(start.clone(), states.len());
        states.push((start, None));
    }
    let mut over = Vec::new();
    let mut at = 0;
    while at < states.len() {
        let state = states[at].0.clone();
        let steps = next(&state);
        if let Err(why) = check(&state, steps.is_empty()) {
            let mut way = vec![format!("{state:?}")];
            let mut from = states[at].1;
            while let Some((before, step)) = from {
                way.push(step.to_owned());
                from = states[before].1;
            }
            way.reverse();
            return Err(Found { why, way });
        }
        if steps.is_empty() {
            over.push(state);
        }
        for (step, state) in steps {
            if !known.contains_key(&state) {
                known.insert(state.clone(), states.len());
                states.push((state, Some((at, step))));
            }
        }
        at += 1;
    }
    Ok((states.len(), over))
}

/// One end, as the world sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Process<M> {
    Alive(M),
    Ended(M),
    /// SIGKILL, or its host is lost.
    Killed,
}

impl<M> Process<M> {
    const fn is_alive(&self) -> bool {
        matches!(self, Self::Alive(_))
    }
}

/// Another command that is tried on the domain, once: it suspends the domain and resumes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Second {
    Possible,
    Working,
    Over,
}
