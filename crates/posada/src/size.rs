//! Sizes as people write them.

/// Bytes of `512M`, `2GiB`, `1.5 GB`, `4096`: K, M, G and T are powers of 1024, with `iB`, `B` or nothing behind them.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let end = text
        .find(|letter: char| !letter.is_ascii_digit() && letter != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit.trim().to_ascii_lowercase();
    let shift = match unit.strip_suffix("ib").or(unit.strip_suffix('b')).unwrap_or(&unit) {
        "" if unit != "ib" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(format!("{unit:?} is not a unit; use K, M, G or T, as in 512M or 2GiB")),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let no_number = || format!("{text:?} is not a size; write it as in 512M or 2GiB");
    if whole.is_empty() || number.ends_with('.') || fraction.contains('.') {
        return Err(no_number());
    }
    let too_large = || format!("{text} is more than a 64-bit machine can address; use a smaller size");
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let mut bytes = whole
        .checked_shl(shift)
        .filter(|bytes| bytes >> shift == whole)
        .ok_or_else(too_large)?;
    if !fraction.is_empty() {
        if fraction.len() > 6 {
            return Err(no_number());
        }
        let parts: u64 = fraction.parse().map_err(|_| no_number())?;
        let scaled = (parts << shift) as u128 / 10_u128.pow(fraction.len() as u32);
        bytes = bytes.checked_add(scaled as u64).ok_or_else(too_large)?;
    }
    Ok(bytes)
}

/// A size for people, with one digit behind the point where there is a unit.
pub fn of(bytes: u64) -> String {
    match bytes {
        0..0x400 => format!("{bytes} bytes"),
        0x400..0x10_0000 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / 1048576.0),
        _ => format!("{:.1} GiB", bytes as f64 / 1073741824.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_write_sizes_in_many_ways() {
        let sizes = [
            ("4096", 4096),
            ("0", 0),
            ("1B", 1),
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            ("2GiB", 2 << 30),
            ("2 GiB", 2 << 30),
            ("2GB", 2 << 30),
            ("1.5G", 3 << 29),
            ("0.25KiB", 256),
            ("1T", 1 << 40),
            ("16777215T", 16777215 << 40),
        ];
        for (text, bytes) in sizes {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn sizes_are_said_in_their_unit() {
        let said = [0, 1023, 1536, 512 << 20, 3 << 29].map(of);
        assert_eq!(said, ["0 bytes", "1023 bytes", "1.5 KiB", "512.0 MiB", "1.5 GiB"]);
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            "M",
            "-1",
            "1X",
            "1iB",
            "1MM",
            ".5G",
            "1.",
            "1.2.3M",
            "16777216T",
            "99999999999999999999",
            "0x10",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
