//! Images, archives and a registry to test with.

use crate::Digest;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use tar::EntryType;

/// A file of a layer.
#[derive(Clone)]
pub struct Item {
    path: String,
    kind: EntryType,
    content: Vec<u8>,
    link: String,
    owner: (u64, u64, u32),
    device: (u32, u32),
    attributes: Vec<(String, Vec<u8>)>,
}

impl Item {
    fn new(path: &str, kind: EntryType) -> Self {
        Self {
            path: path.into(),
            kind,
            content: Vec::new(),
            link: String::new(),
            owner: (0, 0, 0o644),
            device: (0, 0),
            attributes: Vec::new(),
        }
    }

    pub fn file(path: &str, content: &str) -> Self {
        Self {
            content: content.into(),
            ..Self::new(path, EntryType::Regular)
        }
    }

    /// What does not get shorter by compression.
    pub fn noise(path: &str, length: usize) -> Self {
        let mut state = 1u64;
        let content = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        });
        Self {
            content: content.take(length).collect(),
            ..Self::new(path, EntryType::Regular)
        }
    }

    pub fn folder(path: &str, mode: u32) -> Self {
        Self {
            owner: (0, 0, mode),
            ..Self::new(path, EntryType::Directory)
        }
    }

    pub fn symlink(path: &str, to: &str) -> Self {
        Self {
            link: to.into(),
            ..Self::new(path, EntryType::Symlink)
        }
    }

    pub fn hard_link(path: &str, to: &str) -> Self {
        Self {
            link: to.into(),
            ..Self::new(path, EntryType::Link)
        }
    }

    pub fn device(path: &str, major: u32, minor: u32) -> Self {
        Self {
            device: (major, minor),
            ..Self::new(path, EntryType::Char)
        }
    }

    pub fn fifo(path: &str) -> Self {
        Self::new(path, EntryType::Fifo)
    }

    pub fn owned(self, uid: u64, gid: u64, mode: u32) -> Self {
        Self {
            owner: (uid, gid, mode),
            ..self
        }
    }

    pub fn attribute(mut self, name: &str, value: &[u8]) -> Self {
        self.attributes.push((name.into(), value.into()));
        self
    }
}

/// A header with the path as it is: the library would refuse those that lead out.
fn append(tar: &mut Vec<u8>, file: &Item, path: &str, link: &str, content: &[u8]) {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(file.kind);
    header.set_size(content.len() as u64);
    header.set_uid(file.owner.0);
    header.set_gid(file.owner.1);
    header.set_mode(file.owner.2);
    header.set_mtime(100);
    if file.kind == EntryType::Char {
        header.set_device_major(file.device.0).unwrap();
        header.set_device_minor(file.device.1).unwrap();
    }
    let fields = header.as_ustar_mut().unwrap();
    fields.name[..path.len()].copy_from_slice(path.as_bytes());
    fields.linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_cksum();
    tar.extend(header.as_bytes());
    tar.extend(content);
    tar.resize(tar.len().next_multiple_of(512), 0);
}

fn tar(files: &[Item]) -> Vec<u8> {
    let mut tar = Vec::new();
    for file in files {
        let mut pax = Vec::new();
        let mut record = |key: &str, value: &[u8]| {
            let rest = key.len() + value.len() + 3;
            // With three digits or so, which are counted too.
            let length = (1..8)
                .map(|digits| rest + digits)
                .find(|length| length.to_string().len() + rest == *length);
            pax.extend(format!("{} {key}=", length.unwrap()).bytes());
            pax.extend(value);
            pax.push(b'\n');
        };
        for (name, value) in &file.attributes {
            record(&format!("SCHILY.xattr.{name}"), value);
        }
        let (mut path, mut link) = (file.path.as_str(), file.link.as_str());
        if path.len() > 100 {
            record("path", path.as_bytes());
            path = "short";
        }
        if link.len() > 100 {
            record("linkpath", link.as_bytes());
            link = "short";
        }
        if !pax.is_empty() {
            append(&mut tar, &Item::new("pax", EntryType::XHeader), "pax", "", &pax);
        }
        append(&mut tar, file, path, link, &file.content);
    }
    tar.resize(tar.len() + 1024, 0);
    tar
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

/// An image in the making.
#[derive(Clone)]
pub struct Build {
    layers: Vec<Vec<u8>>,
    architecture: &'static str,
    compression: &'static str,
    wrong_diff_id: bool,
}

impl Build {
    pub fn new() -> Self {
        Self {
            layers: Vec::new(),
            architecture: "amd64",
            compression: "gzip",
            wrong_diff_id: false,
        }
    }

    pub fn layer(mut self, files: &[Item]) -> Self {
        self.layers.push(tar(files));
        self
    }

    pub fn architecture(mut self, architecture: &'static str) -> Self {
        self.architecture = architecture;
        self
    }

    pub fn compressed(mut self, compression: &'static str) -> Self {
        self.compression = compression;
        self
    }

    pub fn with_wrong_diff_id(mut self) -> Self {
        self.wrong_diff_id = true;
        self
    }

    pub fn layers(&self) -> &[Vec<u8>] {
        &self.layers
    }

    pub fn layers_length(&self) -> usize {
        self.blobs().iter().map(Vec::len).sum()
    }

    fn blobs(&self) -> Vec<Vec<u8>> {
        let compress = |layer: &Vec<u8>| match self.compression {
            "zstd" => ruzstd::encoding::compress_to_vec(&layer[..], ruzstd::encoding::CompressionLevel::Fastest),
            _ => gzip(layer),
        };
        self.layers.iter().map(compress).collect()
    }

    fn config(&self) -> Vec<u8> {
        let mut diff_ids: Vec<Digest> = self.layers.iter().map(|layer| Digest::of(layer)).collect();
        if self.wrong_diff_id {
            diff_ids[0] = Digest::of(b"another");
        }
        let config = serde_json::json!({
            "architecture": self.architecture, "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"], "WorkingDir": "/root", "Entrypoint": null},
        });
        serde_json::to_vec(&config).unwrap()
    }

    /// The manifest, and all blobs.
    fn parts(&self) -> (Vec<u8>, HashMap<Digest, Vec<u8>>) {
        let mut blobs = HashMap::new();
        let mut add = |bytes: Vec<u8>| {
            let described = serde_json::json!({"digest": Digest::of(&bytes), "size": bytes.len()});
            blobs.insert(Digest::of(&bytes), bytes);
            described
        };
        let config = add(self.config());
        let layers: Vec<_> = self.blobs().into_iter().map(&mut add).collect();
        let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": layers});
        (serde_json::to_vec(&manifest).unwrap(), blobs)
    }

    /// An index with a second architecture in front, and attestations, as builders write it.
    fn index(&self, manifest: &[u8]) -> Vec<u8> {
        let other = Digest::of(b"other");
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [
            {"digest": other, "size": 5, "platform": {"os": "linux", "architecture": "s390x"}},
            {"digest": Digest::of(manifest), "size": manifest.len(),
             "platform": {"os": "linux", "architecture": self.architecture}},
            {"digest": other, "size": 5, "platform": {"os": "unknown", "architecture": "unknown"}},
        ]});
        serde_json::to_vec(&index).unwrap()
    }

    pub fn oci_archive(&self, name: &str) -> Vec<u8> {
        let (manifest, blobs) = self.parts();
        let mut files: Vec<Item> = Vec::new();
        let mut add = |path: String, content: Vec<u8>| {
            files.push(Item {
                content,
                ..Item::new(&path, EntryType::Regular)
            });
        };
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
            "digest": Digest::of(&manifest), "size": manifest.len(),
            "annotations": {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": "1"},
        }]});
        add(format!("blobs/sha256/{}", Digest::of(&manifest).hex()), manifest);
        let mut blobs: Vec<_> = blobs.into_iter().collect();
        blobs.sort();
        for (digest, content) in blobs {
            add(format!("blobs/sha256/{}", digest.hex()), content);
        }
        add("oci-layout".into(), b"{\"imageLayoutVersion\": \"1.0.0\"}".to_vec());
        add("index.json".into(), serde_json::to_vec(&index).unwrap());
        tar(&files)
    }

    pub fn docker_archive(&self, name: &str) -> Vec<u8> {
        let config = self.config();
        let config_name = format!("{}.json", Digest::of(&config).hex());
        let layers: Vec<String> = (0..self.layers.len()).map(|at| format!("{at}/layer.tar")).collect();
        let saved = serde_json::json!([{"Config": config_name, "RepoTags": [name], "Layers": layers}]);
        let mut files = vec![Item {
            content: config,
            ..Item::new(&config_name, EntryType::Regular)
        }];
        for (at, (path, layer)) in layers.iter().zip(&self.layers).enumerate() {
            // The first is shared with another image, by a link.
            if at == 0 {
                files.push(Item {
                    content: layer.clone(),
                    ..Item::new("other/layer.tar", EntryType::Regular)
                });
                files.push(Item::symlink(path, "../other/layer.tar"));
            } else {
                files.push(Item {
                    content: layer.clone(),
                    ..Item::new(path, EntryType::Regular)
                });
            }
        }
        files.push(Item {
            content: serde_json::to_vec(&saved).unwrap(),
            ..Item::new("manifest.json", EntryType::Regular)
        });
        tar(&files)
    }
}

/// How a registry serves.
#[derive(Clone, Default)]
pub struct Serve {
    /// Answers for a blob that end in the middle.
    pub cuts: u32,
    /// Where in the blob they end; else in the middle.
    pub cut_at: Option<usize>,
    /// It can go on in the middle.
    pub ranges: bool,
    /// Paths in which a bit of the answer is wrong.
    pub flip: Option<&'static str>,
    /// Blobs that go on behind their end.
    pub longer: bool,
    /// Who may ask.
    pub user: Option<(&'static str, &'static str)>,
}

struct State {
    serve: Serve,
    cuts: HashMap<String, u32>,
    blobs: u64,
    bytes: u64,
}

/// A registry with one image.
pub struct Registry {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl Registry {
    pub fn start(build: Build, serve: Serve) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new(State {
            serve,
            cuts: HashMap::new(),
            blobs: 0,
            bytes: 0,
        }));
        let (manifest, blobs) = build.parts();
        let index = build.index(&manifest);
        let content = Arc::new((manifest, index, blobs));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (content, state) = (content.clone(), shared.clone());
                // Whoever goes away in between is no error here.
                std::thread::spawn(move || drop(answer(stream.unwrap(), port, &content, &state)));
            }
        });
        Self { port, state }
    }

    pub fn name(&self) -> String {
        format!("127.0.0.1:{}/some/system:1", self.port)
    }

    pub fn serve(&self, serve: Serve) {
        self.state.lock().unwrap().serve = serve;
    }

    pub fn blobs_served(&self) -> u64 {
        self.state.lock().unwrap().blobs
    }

    pub fn bytes_served(&self) -> u64 {
        self.state.lock().unwrap().bytes
    }
}

type Content = (Vec<u8>, Vec<u8>, HashMap<Digest, Vec<u8>>);

fn answer(mut stream: TcpStream, port: u16, content: &Content, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut first, mut headers) = (String::new(), HashMap::new());
    reader.read_line(&mut first)?;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(": ") {
            Some((key, value)) => drop(headers.insert(key.to_lowercase(), value.to_string())),
            None => break,
        }
    }
    let path = first.split(' ').nth(1).unwrap_or_default().to_string();
    let serve = state.lock().unwrap().serve.clone();
    let mut reply = |status: &str, more: &str, length: usize, body: &[u8]| {
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{more}\r\n");
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)
    };
    let authorization = headers.get("authorization").map(String::as_str);
    if path.starts_with("/token") {
        // "me:secret"
        return match authorization {
            Some("Basic bWU6c2VjcmV0") => reply("200 OK", "", 20, b"{\"token\": \"abc.def\"}"),
            _ => reply("401 Unauthorized", "", 0, b""),
        };
    }
    if serve.user.is_some() && authorization != Some("Bearer abc.def") {
        let challenge = format!(
            "WWW-Authenticate: Bearer realm=\"http://127.0.0.1:{port}/token\",service=\"test\",scope=\"repository:some/system:pull\"\r\n"
        );
        return reply("401 Unauthorized", &challenge, 0, b"");
    }
    let Some(rest) = path.strip_prefix("/v2/some/system/") else {
        return reply("404 Not Found", "", 0, b"");
    };
    let (manifest, index, blobs) = content;
    let (kind, what) = rest.split_once('/').unwrap_or_default();
    let digest = what.parse::<Digest>().ok();
    let body = match (kind, what) {
        ("manifests", "1") => Some(index),
        ("manifests", _) => [manifest, index]
            .into_iter()
            .find(|body| digest == Some(Digest::of(body))),
        _ => digest.and_then(|digest| blobs.get(&digest)),
    };
    let Some(body) = body else {
        return reply("404 Not Found", "", 0, b"");
    };
    let mut body = body.clone();
    let mut more = format!("Docker-Content-Digest: {}\r\n", Digest::of(&body));
    if serve.flip == Some(kind) {
        body[0] ^= 0x20;
        // Of a manifest: still JSON.
        if kind == "manifests" {
            body[0] ^= 0x20;
            body.push(b' ');
        }
    }
    // A configuration is JSON: only layers are served badly.
    let layer = kind == "blobs" && !body.starts_with(b"{") && !body.starts_with(b"[");
    if serve.longer && layer {
        body.extend([0; 100]);
    }
    let mut status = "200 OK";
    let mut begin = 0;
    if let Some(range) = headers.get("range").filter(|_| serve.ranges) {
        begin = range
            .trim_start_matches("bytes=")
            .trim_end_matches('-')
            .parse()
            .unwrap();
        more += &format!("Content-Range: bytes {begin}-{}/{}\r\n", body.len() - 1, body.len());
        status = "206 Partial Content";
    }
    let mut end = body.len();
    {
        let mut state = state.lock().unwrap();
        let cuts = state.cuts.entry(path.clone()).or_default();
        if layer && *cuts < serve.cuts {
            *cuts += 1;
            end = serve.cut_at.unwrap_or(end / 2 + *cuts as usize).clamp(begin, end);
        }
        state.blobs += u64::from(kind == "blobs");
        state.bytes += (end - begin) as u64;
    }
    reply(status, &more, body.len() - begin, &body[begin..end])
}

/// What `debugfs` says to a request.
pub fn debugfs(disk: &Path, request: &str) -> String {
    let output = Command::new("debugfs")
        .env("PATH", std::env::var("PATH").unwrap() + ":/usr/sbin:/sbin")
        .args(["-R", request])
        .arg(disk)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// The names in a folder.
pub fn listing(disk: &Path, folder: &str) -> Vec<String> {
    let mut names: Vec<String> = debugfs(disk, &format!("ls -p {folder}"))
        .lines()
        .filter_map(|line| Some(line.split('/').nth(5)?.to_string()))
        .filter(|name| !name.is_empty() && name != "." && name != "..")
        .collect();
    names.sort();
    names
}

/// The file system has no fault.
pub fn fsck(disk: &Path) {
    let output = Command::new("e2fsck")
        .env("PATH", std::env::var("PATH").unwrap() + ":/usr/sbin:/sbin")
        .arg("-fn")
        .arg(disk)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
