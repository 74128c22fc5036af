//! Bringing vector registers in before they are used.

use super::{Cold, Emitter, Kind, Operation, condition, frame, live};

impl Emitter {
    /// Makes what these instructions need of the vector registers live, up to where all are saved.
    pub(super) fn want_vectors(&mut self, flags: bool, operations: &[(u64, Operation)]) {
        let until = operations
            .iter()
            .take_while(|(_, operation)| operation.kind != Kind::Interpret);
        let level = until.map(|(_, operation)| operation.vectors).max().unwrap_or_default();
        if level == live::NONE {
            return;
        }
        self.save(flags);
        let a = &mut self.assembler;
        a.compare_byte(frame::VECTORS_LIVE, level);
        let hole = a.branch(condition::B);
        let back = a.here();
        self.cold.push(Cold::Vectors { hole, back, level });
        self.vectors = level;
    }
}
