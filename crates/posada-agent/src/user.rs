//! Users, as `/etc/passwd` and `/etc/group` have them: a static program has no other name services.

use crate::session::Refusal;
use crate::system::System;
use posada_protocol::Failure;
use std::fs;
use std::io;
use std::path::Path;

/// A user and what a process of his needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    /// All groups, the first included.
    pub groups: Vec<u32>,
    pub home: String,
    pub shell: String,
}

impl User {
    /// The user of this name or number, which need not be in the file.
    pub fn find(system: &System, user: &str) -> Result<Self, Refusal> {
        let read =
            |path: &str| lossy(&system.path(path)).map_err(|error| Refusal::of(format!("cannot read {path}"), &error));
        Self::parse(&read("/etc/passwd")?, &read("/etc/group")?, user)
            .ok_or_else(|| Refusal::new(Failure::NotFound, format!("there is no user {user}")))
    }

    fn parse(passwd: &str, group: &str, user: &str) -> Option<Self> {
        let number: Option<u32> = user.parse().ok();
        let lines = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
        let found = lines.filter_map(|fields| match fields[..] {
            [name, _, uid, gid, _, home, shell] => Some(Self {
                name: name.into(),
                uid: uid.parse().ok()?,
                gid: gid.parse().ok()?,
                groups: Vec::new(),
                home: if home.is_empty() { "/" } else { home }.into(),
                shell: if shell.is_empty() { "/bin/sh" } else { shell }.into(),
            }),
            _ => None,
        });
        let mut found: Vec<_> = found.collect();
        let by_name = found.iter().position(|each| each.name == user);
        let at = by_name.or_else(|| found.iter().position(|each| Some(each.uid) == number));
        let mut user = match (at, number) {
            (Some(at), _) => found.swap_remove(at),
            (None, Some(uid)) => Self {
                name: uid.to_string(),
                uid,
                gid: uid,
                groups: Vec::new(),
                home: "/".into(),
                shell: "/bin/sh".into(),
            },
            (None, None) => return None,
        };
        user.groups.push(user.gid);
        for line in group.lines() {
            let fields: Vec<_> = line.split(':').collect();
            if let [_, _, gid, members] = fields[..]
                && let Ok(gid) = gid.parse()
                && members.split(',').any(|member| member == user.name)
                && !user.groups.contains(&gid)
            {
                user.groups.push(gid);
            }
        }
        Some(user)
    }
}

/// A file's text; none where there is no file, as in a small initramfs.
fn lossy(path: &Path) -> io::Result<String> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\
        broken line\n\
        ann:x:1000:100::/home/ann:\n\
        1001:x:5:5::/odd:/bin/odd\n\
        bad:x:many:1::/:/bin/sh\n";
    const GROUP: &str = "root:x:0:\naudio:x:29:ann,bob\nusers:x:100:ann\nvideo:x:44:joann\n";

    #[test]
    fn users_are_found_by_name_and_number() {
        let find = |user| User::parse(PASSWD, GROUP, user);
        let ann = find("ann").unwrap();
        assert_eq!((ann.uid, ann.gid, &ann.groups[..]), (1000, 100, &[100, 29][..]));
        assert_eq!((&*ann.home, &*ann.shell), ("/home/ann", "/bin/sh"));
        assert_eq!(find("1000"), Some(ann));
        assert_eq!(find("0").unwrap().home, "/root");
        // A name wins.
        assert_eq!(find("1001").unwrap().uid, 5);
        let nobody = find("4242").unwrap();
        assert_eq!((nobody.uid, nobody.groups, &*nobody.home), (4242, vec![4242], "/"));
        assert_eq!((find("bad"), find("bob"), find("")), (None, None, None));
        assert_eq!(User::parse("", "", "root"), None);
    }
}
