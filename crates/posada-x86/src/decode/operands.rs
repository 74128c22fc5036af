//! Macros that pick the instance of a generic handler for an operand's size and place.

/// `sized!(bytes, handler, A, B)`: `handler::<T, A, B>` with the unsigned integer `T` of that many bytes.
macro_rules! sized {
    ($bytes:expr, $handler:path $(, $place:ty)*) => {{
        use $handler as generic;
        match $bytes {
            1 => generic::<u8 $(, $place)*> as $crate::insn::Handler,
            2 => generic::<u16 $(, $place)*>,
            4 => generic::<u32 $(, $place)*>,
            _ => generic::<u64 $(, $place)*>,
        }
    }};
}

/// `condition!(cc, handler, A, B)`: `handler::<A, B, CC>` for one of the 16 conditions.
macro_rules! condition {
    ($cc:expr, $handler:path $(, $place:ty)*) => {{
        use $handler as generic;
        match $cc & 15 {
            0 => generic::<$($place,)* 0> as $crate::insn::Handler,
            1 => generic::<$($place,)* 1>,
            2 => generic::<$($place,)* 2>,
            3 => generic::<$($place,)* 3>,
            4 => generic::<$($place,)* 4>,
            5 => generic::<$($place,)* 5>,
            6 => generic::<$($place,)* 6>,
            7 => generic::<$($place,)* 7>,
            8 => generic::<$($place,)* 8>,
            9 => generic::<$($place,)* 9>,
            10 => generic::<$($place,)* 10>,
            11 => generic::<$($place,)* 11>,
            12 => generic::<$($place,)* 12>,
            13 => generic::<$($place,)* 13>,
            14 => generic::<$($place,)* 14>,
            _ => generic::<$($place,)* 15>,
        }
    }};
}

/// `rm!(decoder, bytes, handler, (A), (B))`: `handler::<T, A, rm, B>`, where `rm` is what ModRM.rm names.
macro_rules! rm {
    ($decoder:expr, $bytes:expr, $handler:path, ($($before:ty),*), ($($after:ty),*)) => {
        if $decoder.is_memory() {
            $crate::decode::operands::sized!($bytes, $handler $(, $before)*, Mem $(, $after)*)
        } else {
            $crate::decode::operands::sized!($bytes, $handler $(, $before)*, Rm $(, $after)*)
        }
    };
}

/// `rm_only!(decoder, handler)`: `handler::<rm>`.
macro_rules! rm_only {
    ($decoder:expr, $handler:path) => {{
        use $handler as generic;
        if $decoder.is_memory() {
            generic::<Mem> as $crate::insn::Handler
        } else {
            generic::<Rm>
        }
    }};
}

/// `arithmetic!(number, bytes, A, B)`: ADD, OR, ADC, SBB, AND, SUB, XOR, CMP by their number in opcodes.
macro_rules! arithmetic {
    ($number:expr, $bytes:expr, $to:ty, $from:ty) => {{
        use $crate::alu;
        use $crate::decode::operands::sized;
        match $number & 7 {
            0 => sized!($bytes, alu::binary, alu::Add, $to, $from),
            1 => sized!($bytes, alu::binary, alu::Or, $to, $from),
            2 => sized!($bytes, alu::binary, alu::Adc, $to, $from),
            3 => sized!($bytes, alu::binary, alu::Sbb, $to, $from),
            4 => sized!($bytes, alu::binary, alu::And, $to, $from),
            5 => sized!($bytes, alu::binary, alu::Sub, $to, $from),
            6 => sized!($bytes, alu::binary, alu::Xor, $to, $from),
            _ => sized!($bytes, alu::compare, alu::Sub, $to, $from),
        }
    }};
}

/// `extend!(bytes, movzx, F, rm)`: `transfer::movzx::<T, F, Reg, rm>`.
macro_rules! extend {
    ($bytes:expr, $handler:ident, $from:ty, $place:ty) => {
        match $bytes {
            2 => $crate::transfer::$handler::<u16, $from, Reg, $place> as $crate::insn::Handler,
            4 => $crate::transfer::$handler::<u32, $from, Reg, $place>,
            _ => $crate::transfer::$handler::<u64, $from, Reg, $place>,
        }
    };
}

pub(super) use {arithmetic, condition, extend, rm, rm_only, sized};
