//! An agent, or a host, that says anything: frames are found whatever the pieces, no more than one is held, and what is no
//! message is told so. The first byte is the size of the pieces.
#![no_main]

use libfuzzer_sys::fuzz_target;
use posada_protocol::{Answer, Decoder, Frame, HEADER, Hello, MOST, Order, Request, read_frame};

fn look_at(frame: &Frame) {
    let Frame::Message(_) = frame else {
        return;
    };
    let _ = frame.message::<Order>();
    let _ = frame.message::<Answer>();
    if let Ok(hello) = frame.message::<Hello>() {
        let _ = Hello::ours().agree(&hello);
    }
    if let Ok(request) = frame.message::<Request>() {
        let text = serde_json::to_string(&request).expect("it came from JSON");
        assert_eq!(serde_json::from_str::<Request>(&text).expect("it is one"), request);
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((piece, bytes)) = input.split_first() else {
        return;
    };
    let (mut decoder, mut reader, mut pushed, mut used) = (Decoder::default(), bytes, 0, 0);
    'pieces: for part in bytes.chunks(usize::from(*piece) + 1) {
        decoder.push(part);
        pushed += part.len();
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => {
                    let (Frame::Message(body) | Frame::Data(_, body)) = &frame;
                    used += HEADER + body.len();
                    look_at(&frame);
                    assert_eq!(read_frame(&mut reader).expect("the same bytes"), Some(frame));
                }
                Ok(None) => break,
                Err(_) => break 'pieces,
            }
        }
        assert!(pushed - used < HEADER + MOST);
    }
    // What is left is no whole frame.
    assert!(!matches!(read_frame(&mut reader), Ok(Some(_))));
});
