//! What VMs are called, and which one a user means.

use std::fmt;

/// The most bytes of a name.
pub const LONGEST: usize = 63;
/// Hexadecimal digits of an id.
const DIGITS: usize = 12;

/// Why a word names no VM.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not a possible name.
    #[error("{0:?} is no name for a VM; use 1 to {LONGEST} letters, digits, '-', '_' and '.', a letter or digit first")]
    Impossible(String),
    /// There is none.
    #[error("there is no VM {word:?}{}", hint(nearest.as_deref()))]
    Unknown {
        /// What was given.
        word: String,
        /// What may have been meant.
        nearest: Option<String>,
    },
    /// More than one.
    #[error("{0:?} is the beginning of {1} VMs' ids; give more of it")]
    Ambiguous(String, usize),
}

fn hint(nearest: Option<&str>) -> String {
    match nearest {
        Some(name) => format!("; did you mean {name:?}?"),
        None => "; posada ls lists what there is".into(),
    }
}

/// Checks that `name` can be a VM's.
///
/// # Errors
/// [`NameError::Impossible`].
pub fn check(name: &str) -> Result<(), NameError> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let first = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    if first && name.len() <= LONGEST && name.bytes().all(good) {
        Ok(())
    } else {
        Err(NameError::Impossible(name.chars().take(LONGEST + 1).collect()))
    }
}

/// An id: random, so that no two stores have the same.
pub fn new_id() -> String {
    let mut bytes = [0; DIGITS / 2];
    let mut filled = 0;
    while filled < bytes.len() {
        // A host without random numbers at this point has not booted; the call waits for it.
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
    }
    Hex(&bytes).to_string()
}

/// Whether a folder's name is an id.
pub fn is_id(text: &str) -> bool {
    text.len() == DIGITS && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(to, "{byte:02x}"))
    }
}

/// The name of a VM whose user gives none: what it is made of, or `vm`, with enough of its id.
pub fn default_name(id: &str) -> String {
    format!("vm-{}", &id[..6.min(id.len())])
}

/// The id of the VM that `word` means, among VMs as (id, name): a name, an id, or the beginning of just one id.
///
/// # Errors
/// [`NameError::Unknown`] with the nearest name, [`NameError::Ambiguous`].
pub fn resolve<'a>(word: &str, vms: impl Iterator<Item = (&'a str, &'a str)> + Clone) -> Result<&'a str, NameError> {
    if let Some((id, _)) = vms.clone().find(|(id, name)| *name == word || *id == word) {
        return Ok(id);
    }
    let mut begin = vms.clone().filter(|(id, _)| !word.is_empty() && id.starts_with(word));
    match (begin.next(), begin.count()) {
        (Some((id, _)), 0) => Ok(id),
        (Some(_), more) => Err(NameError::Ambiguous(word.into(), more + 1)),
        (None, _) => Err(NameError::Unknown {
            word: word.chars().take(LONGEST + 1).collect(),
            nearest: nearest(word, vms.map(|(_, name)| name)).map(Into::into),
        }),
    }
}

/// The candidate that somebody who mistyped it may have meant by `word`.
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    if word.len() > LONGEST {
        return None;
    }
    candidates
        .map(|name| (strsim::damerau_levenshtein(word, name), name))
        .filter(|(distance, name)| *distance <= (word.len().max(name.len()) / 3).max(1))
        .min()
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VMS: [(&str, &str); 3] = [
        ("0123456789ab", "web"),
        ("0124456789ab", "database"),
        ("fedcba987654", "0125"),
    ];

    fn found(word: &str) -> Result<&'static str, NameError> {
        resolve(word, VMS.iter().copied())
    }

    #[test]
    fn a_vm_is_found_by_name_id_and_beginning() {
        assert_eq!(found("web"), Ok("0123456789ab"));
        assert_eq!(found("0124456789ab"), Ok("0124456789ab"));
        assert_eq!(found("0123"), Ok("0123456789ab"));
        assert_eq!(found("0125"), Ok("fedcba987654"), "a name comes before a beginning");
        assert_eq!(found("012"), Err(NameError::Ambiguous("012".into(), 2)));
    }

    #[test]
    fn a_wrong_name_gets_the_nearest_one() {
        let said = |word| found(word).unwrap_err().to_string();
        assert!(said("databse").contains("did you mean \"database\"?"));
        assert!(said("wbe").contains("did you mean \"web\"?"));
        assert!(said("mail").contains("posada ls"));
        assert!(said("").contains("posada ls"));
        assert!(said(&"x".repeat(100_000)).len() < 200);
    }

    #[test]
    fn names_fit_everywhere() {
        for good in ["a", "web-1", "A_b.c", "0", &"x".repeat(63)] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for bad in ["", "-a", ".", "..", "a/b", "a b", "ä", "a\0", &"x".repeat(64)] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ids_are_ids_and_differ() {
        let (a, b) = (new_id(), new_id());
        assert!(is_id(&a) && is_id(&b) && a != b);
        assert!(!is_id("0123456789aB") && !is_id("..") && !is_id(""));
        assert_eq!(check(&default_name(&a)), Ok(()));
    }
}
