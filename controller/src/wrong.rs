//! From an error to an exit code.

use thiserror::Error;

use crate::{
    agents::{CallError, NoAgent, Unreachable},
    cli::exit,
    faults::NotArmed,
    plan,
};

/// The command or the plan is wrong. Nothing was injected.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub(crate) struct Wrong(pub String);

/// The exit code of an error that ends a command.
pub(crate) fn exit_code(error: &anyhow::Error) -> u8 {
    let call = error.downcast_ref::<CallError>().or(match error.downcast_ref::<NotArmed>() {
        Some(NotArmed::Call(call)) => Some(call),
        _ => None,
    });
    match call {
        Some(CallError::Lost { .. }) => return exit::ABORTED,
        Some(CallError::Refused { .. } | CallError::NotThere { .. }) => return exit::WRONG,
        Some(CallError::Failed { .. }) => return exit::OURS,
        None => {}
    }
    if error.is::<Unreachable>() {
        exit::ABORTED
    } else if error.is::<Wrong>()
        || error.is::<NoAgent>()
        || error.is::<plan::Invalid>()
        || error.is::<NotArmed>()
    {
        exit::WRONG
    } else {
        exit::OURS
    }
}
