//! One VM: machine, boot, run loop.
