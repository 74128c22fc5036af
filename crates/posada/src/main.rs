//! The `posada` command.

fn main() {}
