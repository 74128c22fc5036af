//! System instructions.

pub mod control;
