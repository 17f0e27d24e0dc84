//! The wire protocol between controller and agent, generated from `proto/squall/v1/agent.proto`.
//!
//! Nothing here has behaviour. Both ends turn these messages into domain types at their edge, once.

/// Version 1 of the protocol.
#[expect(missing_docs, reason = "generated; the documentation is in the .proto file")]
#[allow(
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    clippy::large_enum_variant,
    clippy::clone_on_ref_ptr,
    unused_qualifications,
    reason = "generated code; what it triggers varies by generator"
)]
pub mod v1 {
    tonic::include_proto!("squall.v1");
}
