//! Tests of the order of records in a libxl stream: only real dependencies are enforced, and each
//! other order is accepted.

#![allow(
    clippy::unwrap_used,
    clippy::arithmetic_side_effects,
    reason = "a test fails by panicking"
)]

use super::{LibxlOrder, LibxlOrderError};
use crate::wrapper::libxl::LibxlRecordKind as Kind;

/// An event in a stream: a record, or a pause of the libxc layer at a CHECKPOINT.
#[derive(Clone, Copy, Debug)]
enum Event {
    Record(Kind),
    Checkpoint,
}

const LIBXC: Event = Event::Record(Kind::LIBXC_CONTEXT);
const XENSTORE: Event = Event::Record(Kind::EMULATOR_XENSTORE_DATA);
const CONTEXT: Event = Event::Record(Kind::EMULATOR_CONTEXT);
const CHECKPOINT_END: Event = Event::Record(Kind::CHECKPOINT_END);
const STATE: Event = Event::Record(Kind::CHECKPOINT_STATE);
const OPTIONAL: Event = Event::Record(Kind(0x8000_0000));
const END: Event = Event::Record(Kind::END);
use Event::Checkpoint;

/// The first error, with the number of events before it.
fn run(events: &[Event]) -> Result<(), (usize, LibxlOrderError)> {
    let mut order = LibxlOrder::new();
    for (index, event) in events.iter().enumerate() {
        match event {
            Checkpoint => order.begin_checkpoint(),
            Event::Record(kind) => order.admit(*kind).map_err(|error| (index, error))?,
        }
    }
    assert_eq!(
        order.ended(),
        matches!(events.last(), Some(Event::Record(Kind::END)))
    );
    Ok(())
}

#[test]
fn every_permitted_order_is_accepted() {
    for events in [
        &[LIBXC, END][..],
        // As libxl writes an HVM guest, and in the opposite order.
        &[LIBXC, XENSTORE, CONTEXT, END],
        &[LIBXC, CONTEXT, XENSTORE, END],
        // Emulators do not depend on memory: they are started when everything has arrived.
        &[XENSTORE, CONTEXT, LIBXC, END],
        &[XENSTORE, LIBXC, CONTEXT, END],
        // Two emulators.
        &[LIBXC, XENSTORE, XENSTORE, CONTEXT, CONTEXT, END],
        // Optional records may be anywhere.
        &[OPTIONAL, LIBXC, OPTIONAL, CONTEXT, OPTIONAL, END],
        // Remus: a PV guest, an HVM guest; and one that ends properly.
        &[
            LIBXC,
            Checkpoint,
            CHECKPOINT_END,
            Checkpoint,
            CHECKPOINT_END,
        ],
        &[
            LIBXC,
            Checkpoint,
            XENSTORE,
            CONTEXT,
            OPTIONAL,
            CHECKPOINT_END,
            Checkpoint,
            CONTEXT,
        ],
        &[LIBXC, Checkpoint, CONTEXT, CHECKPOINT_END, CONTEXT, END],
        // COLO: control words between checkpoints.
        &[
            LIBXC,
            Checkpoint,
            CONTEXT,
            CHECKPOINT_END,
            STATE,
            Checkpoint,
            CHECKPOINT_END,
            STATE,
        ],
    ] {
        assert_eq!(run(events), Ok(()), "{events:?}");
    }
}

#[test]
fn what_a_restorer_cannot_use_is_refused() {
    let in_checkpoint = |kind| LibxlOrderError::InCheckpoint { kind };
    for (events, error) in [
        (&[END][..], LibxlOrderError::Incomplete),
        (&[XENSTORE, CONTEXT, END], LibxlOrderError::Incomplete),
        (&[LIBXC, CONTEXT, LIBXC], LibxlOrderError::Repeated),
        (
            &[LIBXC, CHECKPOINT_END],
            LibxlOrderError::NotInCheckpoint {
                kind: Kind::CHECKPOINT_END,
            },
        ),
        (
            &[LIBXC, Checkpoint, CHECKPOINT_END, CHECKPOINT_END],
            LibxlOrderError::NotInCheckpoint {
                kind: Kind::CHECKPOINT_END,
            },
        ),
        (&[LIBXC, Checkpoint, END], in_checkpoint(Kind::END)),
        (
            &[LIBXC, Checkpoint, LIBXC],
            in_checkpoint(Kind::LIBXC_CONTEXT),
        ),
        (
            &[LIBXC, Checkpoint, STATE],
            in_checkpoint(Kind::CHECKPOINT_STATE),
        ),
        (&[LIBXC, STATE], LibxlOrderError::NotCheckpointed),
        (
            &[LIBXC, END, END],
            LibxlOrderError::AfterEnd { kind: Kind::END },
        ),
        (
            &[LIBXC, END, OPTIONAL],
            LibxlOrderError::AfterEnd {
                kind: Kind(0x8000_0000),
            },
        ),
    ] {
        assert_eq!(run(events), Err((events.len() - 1, error)), "{events:?}");
    }
}

#[test]
fn a_refused_record_changes_nothing() {
    let mut order = LibxlOrder::new();
    assert_eq!(order.admit(Kind::END), Err(LibxlOrderError::Incomplete));
    assert!(!order.ended());
    order.admit(Kind::LIBXC_CONTEXT).unwrap();
    assert_eq!(
        order.admit(Kind::LIBXC_CONTEXT),
        Err(LibxlOrderError::Repeated)
    );
    order.admit(Kind::END).unwrap();
    assert!(order.ended());
}
