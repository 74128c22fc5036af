//! Names of images, as Docker writes them: `debian`, `debian:12`, `ghcr.io/someone/thing:tag`, `name@sha256:...`.

use crate::{Digest, Error};
use std::fmt;
use std::str::FromStr;

/// Where a name without a host is pulled from.
const DEFAULT_REGISTRY: &str = "docker.io";
/// The host that serves it.
const DEFAULT_HOST: &str = "registry-1.docker.io";
/// What stands before a name without a slash at that registry.
const DEFAULT_FOLDER: &str = "library/";
const DEFAULT_TAG: &str = "latest";
/// Bytes: a name is part of a file's name, where most of its characters take one byte and the rest three.
const LONGEST: usize = 200;

/// The name of an image: a repository, and a tag or a digest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    /// With the host, if that is not the default registry.
    repository: String,
    tag: String,
    digest: Option<Digest>,
}

impl Name {
    /// The repository as people write it: without the default registry's host and folder.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag; `latest` unless given.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// The digest of the manifest, if the name has one: it decides, and not the tag.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    fn host_and_path(&self) -> Option<(&str, &str)> {
        self.repository.split_once('/').filter(|(host, _)| is_host(host))
    }

    /// Host and port of the registry that has it.
    pub fn registry(&self) -> &str {
        self.host_and_path().map_or(DEFAULT_HOST, |(host, _)| host)
    }

    /// The repository's path at that registry.
    pub fn path(&self) -> String {
        match self.host_and_path() {
            Some((_, path)) => path.into(),
            None if self.repository.contains('/') => self.repository.clone(),
            None => format!("{DEFAULT_FOLDER}{}", self.repository),
        }
    }

    /// The name as part of a file's name: no slashes, no dot in front.
    pub(crate) fn file_name(&self) -> String {
        let mut out = String::new();
        for byte in self.to_string().bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' => out.push(byte.into()),
                b'.' if !out.is_empty() => out.push('.'),
                _ => out.push_str(&format!("%{byte:02x}")),
            }
        }
        out
    }

    /// The name that a file of the store stands for.
    pub(crate) fn from_file_name(text: &str) -> Option<Self> {
        let mut bytes = Vec::new();
        let mut rest = text.as_bytes();
        while let [first, tail @ ..] = rest {
            if *first == b'%' {
                let (digits, tail) = tail.split_at_checked(2)?;
                bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
                rest = tail;
            } else {
                bytes.push(*first);
                rest = tail;
            }
        }
        let name: Self = String::from_utf8(bytes).ok()?.parse().ok()?;
        (name.file_name() == text).then_some(name)
    }
}

/// A first component is a host if it has a dot or a port or is `localhost`, as Docker decides it.
fn is_host(component: &str) -> bool {
    component.contains(['.', ':']) || component == "localhost"
}

fn check_component(component: &str) -> Result<(), &'static str> {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    if component.is_empty() {
        return Err("a part of it is empty");
    }
    if component.chars().any(|c| c.is_ascii_uppercase()) {
        return Err("a repository has no capital letters");
    }
    if !component
        .chars()
        .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c))
    {
        return Err("a repository has only small letters, digits, '.', '_' and '-'");
    }
    if !edge(component.chars().next()) || !edge(component.chars().last()) {
        return Err("each part of a repository begins and ends with a letter or digit");
    }
    Ok(())
}

fn check_host(host: &str) -> Result<(), &'static str> {
    let (name, port) = host
        .split_once(':')
        .map_or((host, None), |(name, port)| (name, Some(port)));
    let fine = name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || ".-".contains(c))
        && port.is_none_or(|port| port.parse::<u16>().is_ok());
    if fine {
        Ok(())
    } else {
        Err("its first part is no host with an optional port")
    }
}

fn parse(text: &str) -> Result<Name, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (
            rest,
            Some(digest.parse().map_err(|_| "what follows @ is no sha256 digest")?),
        ),
        None => (text, None),
    };
    // A colon behind the last slash begins a tag; one before it, a port.
    let slash = rest.rfind('/').map_or(0, |at| at + 1);
    let (repository, tag) = match rest[slash..].find(':') {
        Some(colon) => (&rest[..slash + colon], &rest[slash + colon + 1..]),
        None => (rest, DEFAULT_TAG),
    };
    let tag_fine = !tag.is_empty()
        && tag.len() <= 128
        && !tag.starts_with(['.', '-'])
        && tag.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    if !tag_fine {
        return Err("a tag has only letters, digits, '_', '.' and '-', and begins with neither of the last two");
    }
    let mut path = repository;
    if let Some((host, rest)) = repository.split_once('/')
        && is_host(host)
    {
        check_host(host)?;
        path = rest;
    }
    path.split('/').try_for_each(check_component)?;
    let repository = repository
        .strip_prefix(DEFAULT_REGISTRY)
        .or_else(|| repository.strip_prefix("index.docker.io"))
        .and_then(|rest| rest.strip_prefix('/'))
        .unwrap_or(repository);
    // What is left is longer by a folder only for repositories of one part.
    let repository = match repository.strip_prefix(DEFAULT_FOLDER) {
        Some(bare) if !bare.contains('/') => bare,
        _ => repository,
    };
    let name = Name {
        repository: repository.into(),
        tag: tag.into(),
        digest,
    };
    if name.file_name().len() > LONGEST {
        return Err("it is too long");
    }
    Ok(name)
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).map_err(|why| Error::Name {
            text: text.chars().take(LONGEST).collect(),
            why,
        })
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.digest {
            Some(digest) => write!(f, "{}@{digest}", self.repository),
            None => write!(f, "{}:{}", self.repository, self.tag),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_are_what_docker_makes_of_them() {
        for (text, shown, registry, path) in [
            ("debian", "debian:latest", DEFAULT_HOST, "library/debian"),
            ("debian:12", "debian:12", DEFAULT_HOST, "library/debian"),
            (
                "docker.io/library/debian",
                "debian:latest",
                DEFAULT_HOST,
                "library/debian",
            ),
            ("someone/thing", "someone/thing:latest", DEFAULT_HOST, "someone/thing"),
            ("localhost:5000/a/b:c", "localhost:5000/a/b:c", "localhost:5000", "a/b"),
            ("ghcr.io/a/b", "ghcr.io/a/b:latest", "ghcr.io", "a/b"),
        ] {
            let name: Name = text.parse().unwrap();
            assert_eq!(name.to_string(), shown);
            assert_eq!((name.registry(), name.path().as_str()), (registry, path));
        }
        let digest = Digest::of(b"");
        let name: Name = format!("debian:12@{digest}").parse().unwrap();
        assert_eq!(name.to_string(), format!("debian@{digest}"));
    }

    #[test]
    fn what_cannot_be_a_name_says_why() {
        for (text, why) in [
            ("", "empty"),
            ("Debian", "capital"),
            ("a//b", "empty"),
            ("../x", "host"),
            ("a/../b", "begins and ends"),
            ("a:", "tag"),
            ("a:.x", "tag"),
            ("a@sha256:12", "digest"),
            ("localhost:99999/a", "host"),
            (&"a".repeat(300), "long"),
        ] {
            let error = text.parse::<Name>().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn a_name_survives_its_file(text in "([a-z.:0-9]{1,9}/)?[a-z0-9._/-]{1,20}(:[a-zA-Z0-9._-]{1,9})?") {
            if let Ok(name) = text.parse::<Name>() {
                prop_assert_eq!(name.to_string().parse::<Name>().unwrap(), name.clone());
                let file = name.file_name();
                prop_assert!(!file.contains('/') && !file.starts_with('.'));
                prop_assert_eq!(Name::from_file_name(&file), Some(name));
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".*") {
            let _ = text.parse::<Name>();
            let _ = Name::from_file_name(&text);
        }
    }
}
