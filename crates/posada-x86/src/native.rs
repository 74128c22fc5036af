//! Native stubs.

/// Stub cache.
#[derive(Default)]
pub struct Native {}
