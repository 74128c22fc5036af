//! Exceptions as the executing instruction raises them (Intel SDM 3A, chapter 6).

/// Marks a `Result` whose error detail waits in [`crate::core::Core::raised`]: small, so that handlers stay fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Raised;

/// What an instruction handler returns.
pub type Exec<T = ()> = Result<T, Raised>;

/// An exception to be delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exception {
    /// Vector 0-31.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error: Option<u32>,
    /// Linear address, for #PF.
    pub address: u64,
    /// DR6 bits to set, for #DB.
    pub dr6: u64,
    /// #GP(0) for a non-canonical address: #SS(0) if the instruction reached it through SS.
    pub non_canonical: bool,
}

/// Vectors.
pub mod vector {
    #![allow(missing_docs, reason = "the manual's own mnemonics")]
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const XM: u8 = 19;
}
