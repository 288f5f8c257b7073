//! The standard's own examples (RFC 7541 appendix C), and what an attacker would send.

use super::*;

type Fields = Vec<(String, String)>;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn hex(digits: &str) -> Vec<u8> {
    let digits: Vec<u8> = digits.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(&text(pair), 16).expect("hex"))
        .collect()
}

fn fields(decoder: &mut Decoder, block: &[u8]) -> Result<Fields, DecodeError> {
    let mut seen = Vec::new();
    decoder.decode(block, |name, value| seen.push((text(name), text(value))))?;
    Ok(seen)
}

fn listed(expected: &[(&str, &str)]) -> Fields {
    expected
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

fn dynamic(decoder: &Decoder) -> Fields {
    decoder
        .entries
        .iter()
        .map(|(name, value)| (text(name), text(value)))
        .collect()
}

const FIRST: [(&str, &str); 4] = [
    (":method", "GET"),
    (":scheme", "http"),
    (":path", "/"),
    (":authority", "www.example.com"),
];

#[test]
fn integers_of_the_standard() {
    // Appendix C.1.
    for (bits, bytes, value) in [
        (5, &[0b1010][..], 10),
        (5, &[0b1_1111, 0b1001_1010, 0b1010], 1337),
        (8, &[0b10_1010], 42),
    ] {
        let mut rest = bytes;
        assert_eq!(integer(&mut rest, bits), Ok(value));
        assert!(rest.is_empty());
    }
}

#[test]
fn integers_have_limits() {
    for (bytes, expected) in [
        (
            &[0x1f, 0xff, 0xff, 0xff, 0xff, 0x0f][..],
            DecodeError::Integer,
        ),
        (
            &[0x1f, 0x80, 0x80, 0x80, 0x80, 0x80, 0x00],
            DecodeError::Integer,
        ),
        (&[0x1f, 0xff, 0xff, 0xff, 0x7f], DecodeError::Integer),
        (&[0x1f, 0x80], DecodeError::Truncated),
        (&[], DecodeError::Truncated),
    ] {
        let mut rest = bytes;
        assert_eq!(integer(&mut rest, 5), Err(expected), "{bytes:02x?}");
    }
}

#[test]
fn literals_of_the_standard() {
    // Appendix C.2.1 to C.2.4.
    let mut decoder = Decoder::default();
    let block = hex("400a 6375 7374 6f6d 2d6b 6579 0d63 7573 746f 6d2d 6865 6164 6572");
    let custom = listed(&[("custom-key", "custom-header")]);
    assert_eq!(fields(&mut decoder, &block), Ok(custom.clone()));
    assert_eq!((dynamic(&decoder), decoder.used), (custom, 55));
    let mut decoder = Decoder::default();
    for (block, expected) in [
        (
            "040c 2f73 616d 706c 652f 7061 7468",
            (":path", "/sample/path"),
        ),
        (
            "1008 7061 7373 776f 7264 0673 6563 7265 74",
            ("password", "secret"),
        ),
        ("82", (":method", "GET")),
    ] {
        assert_eq!(fields(&mut decoder, &hex(block)), Ok(listed(&[expected])));
        assert!(decoder.entries.is_empty());
    }
}

/// Appendix C.3 and C.4: the same three requests, plain and Huffman coded.
#[test]
fn requests_of_the_standard() {
    for blocks in [
        [
            "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
            "8286 84be 5808 6e6f 2d63 6163 6865",
            "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
        ],
        [
            "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
            "8286 84be 5886 a8eb 1064 9cbf",
            "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
        ],
    ] {
        let mut decoder = Decoder::default();
        let [first, second, third] = blocks.map(hex);
        assert_eq!(fields(&mut decoder, &first), Ok(listed(&FIRST)));
        assert_eq!(decoder.used, 57);
        let mut more = FIRST.to_vec();
        more.push(("cache-control", "no-cache"));
        assert_eq!(fields(&mut decoder, &second), Ok(listed(&more)));
        assert_eq!(decoder.used, 110);
        let last = [
            (":method", "GET"),
            (":scheme", "https"),
            (":path", "/index.html"),
            (":authority", "www.example.com"),
            ("custom-key", "custom-value"),
        ];
        assert_eq!(fields(&mut decoder, &third), Ok(listed(&last)));
        assert_eq!(decoder.used, 164);
    }
}

/// Appendix C.5 and C.6: responses, with a table of 256 bytes, so that entries are evicted.
#[test]
fn responses_of_the_standard() {
    for blocks in [
        [
            "4803 3330 3258 0770 7269 7661 7465 611d 4d6f 6e2c 2032 3120 4f63 7420 3230 3133 2032 303a 3133 3a32 3120 474d 546e 1768 7474 7073 3a2f 2f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
            "4803 3330 37c1 c0bf",
        ],
        [
            "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d 29ad 1718 63c7 8f0b 97c8 e9ae 82ae 43d3",
            "4883 640e ffc1 c0bf",
        ],
    ] {
        let mut decoder = Decoder::default();
        decoder.allow(256);
        let [first, second] = blocks.map(hex);
        let rest = [
            ("cache-control", "private"),
            ("date", "Mon, 21 Oct 2013 20:13:21 GMT"),
            ("location", "https://www.example.com"),
        ];
        let answer = |status| {
            let mut all = vec![(":status", status)];
            all.extend(rest);
            listed(&all)
        };
        assert_eq!(fields(&mut decoder, &first), Ok(answer("302")));
        assert_eq!(decoder.used, 222);
        assert_eq!(fields(&mut decoder, &second), Ok(answer("307")));
        assert_eq!(decoder.used, 222);
        assert!(!dynamic(&decoder).contains(&(":status".into(), "302".into())));
    }
}

#[test]
fn a_table_size_update_comes_first_and_within_the_limit() {
    let mut decoder = Decoder::default();
    // What the h2 crate begins with when told that the size is 0.
    decoder.allow(0);
    assert_eq!(
        fields(&mut decoder, &[0x20, 0x88]),
        Ok(listed(&[(":status", "200")]))
    );
    // Down and up again, within one block (section 4.2).
    let mut decoder = Decoder::default();
    assert_eq!(
        fields(&mut decoder, &hex("20 3f e1 1f 88")),
        Ok(listed(&[(":status", "200")]))
    );
    assert_eq!(decoder.limit, 4096);
    assert_eq!(
        fields(&mut decoder, &[0x88, 0x20]),
        Err(DecodeError::TableSize)
    );
    assert_eq!(
        fields(&mut decoder, &hex("3f e2 1f")),
        Err(DecodeError::TableSize)
    );
}

#[test]
fn a_smaller_table_forgets_and_too_large_an_entry_empties() {
    let mut decoder = Decoder::default();
    let add = hex("4001 6101 62");
    fields(&mut decoder, &add).expect("literal");
    assert_eq!(fields(&mut decoder, &[0xbe]), Ok(listed(&[("a", "b")])));
    decoder.allow(40);
    fields(&mut decoder, &add).expect("literal");
    assert_eq!(decoder.entries.len(), 1);
    let mut large = hex("4001 6114");
    large.extend([b'x'; 20]);
    fields(&mut decoder, &large).expect("not an error");
    assert!(decoder.entries.is_empty() && decoder.used == 0);
}

#[test]
fn what_names_nothing_is_refused() {
    for (block, expected) in [
        ("80", DecodeError::Index),
        ("be", DecodeError::Index),
        ("7e 00", DecodeError::Index),
        ("40", DecodeError::Truncated),
        ("00 05 61", DecodeError::Truncated),
        ("00 01 61", DecodeError::Truncated),
        ("00 81 ff 00", DecodeError::Huffman),
    ] {
        assert_eq!(
            fields(&mut Decoder::default(), &hex(block)),
            Err(expected),
            "{block}"
        );
    }
}

#[test]
fn what_we_encode_decodes() {
    let long = "v".repeat(20_000);
    let mut block = Vec::new();
    put_connect(&mut block, b"10.1.0.5:80");
    put_field(&mut block, b"baggage", long.as_bytes());
    let expected = listed(&[
        (":method", "CONNECT"),
        (":authority", "10.1.0.5:80"),
        ("baggage", &long),
    ]);
    assert_eq!(fields(&mut Decoder::default(), &block), Ok(expected));
    for status in [200, 401, 503] {
        let mut block = Vec::new();
        put_status(&mut block, status);
        let expected = listed(&[(":status", &status.to_string())]);
        assert_eq!(fields(&mut Decoder::default(), &block), Ok(expected));
    }
    for length in [0, 126, 127, 128, 254, 255, 300] {
        let value = "x".repeat(length);
        let mut block = Vec::new();
        put_field(&mut block, b"n", value.as_bytes());
        assert_eq!(
            fields(&mut Decoder::default(), &block),
            Ok(listed(&[("n", &value)]))
        );
    }
}
