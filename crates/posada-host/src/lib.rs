//! The host: what VMs there are, which of them run, and the API by which users say so.
//!
//! A VM is a process of its own that outlives the daemon. What must survive is on disk ([`store`]); what to do with it is decided
//! without I/O ([`policy`]).

pub mod api;
pub mod client;
pub mod control;
pub mod events;
pub mod host;
pub mod logs;
pub mod name;
pub mod operations;
pub mod policy;
pub mod process;
pub mod server;
pub mod spec;
pub mod store;
pub mod vm;
