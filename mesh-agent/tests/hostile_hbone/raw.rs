//! HTTP/2 frames made by hand, because no library sends what an attacker would. RFC 9113 sections 3.4, 4.1, 6 and
//! RFC 7541 section 6.

use anyhow::{Context as _, Result, bail, ensure};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout,
};

use crate::peer::LIMIT;

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
const ACK: u8 = 1;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const PADDED: u8 = 8;
/// RFC 7541 appendix A: `:status 200` is entry 8 of the static table.
const STATUS_200: u8 = 0x88;

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// `:status 200`.
    Accepted,
    /// Another status.
    Refused,
    /// RST_STREAM.
    Reset,
    /// GOAWAY, or the connection ended.
    Closed,
}

/// Sends the preface and one request with these fields, and waits for what becomes of it.
pub async fn request<S>(stream: &mut S, fields: &[(&[u8], &[u8])]) -> Result<Answer>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut bytes = PREFACE.to_vec();
    frame(&mut bytes, SETTINGS, 0, 0, &[]);
    frame(&mut bytes, HEADERS, END_HEADERS, 1, &header_block(fields)?);
    // A server that has closed already is one of the answers.
    if stream.write_all(&bytes).await.is_err() || stream.flush().await.is_err() {
        return Ok(Answer::Closed);
    }
    timeout(LIMIT, answer(stream))
        .await
        .context("no answer at all")?
}

/// A whole conversation on one stream, with GOAWAY in its middle: no new streams, but this one goes on (RFC 9113 section
/// 6.8). Returns what comes back until the server's end.
pub async fn goaway_in_between<S>(
    stream: &mut S,
    fields: &[(&[u8], &[u8])],
    before: &[u8],
    after: &[u8],
) -> Result<Vec<u8>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let answer = request(stream, fields).await?;
    ensure!(answer == Answer::Accepted, "{answer:?}");
    let mut bytes = Vec::new();
    frame(&mut bytes, DATA, 0, 1, before);
    // The last stream of the server's that was seen, none, and NO_ERROR.
    frame(&mut bytes, GOAWAY, 0, 0, &[0; 8]);
    frame(&mut bytes, DATA, END_STREAM, 1, after);
    stream.write_all(&bytes).await?;
    stream.flush().await?;
    let mut heard = Vec::new();
    loop {
        let (kind, flags, payload) = timeout(LIMIT, read_frame(stream)).await??;
        match kind {
            DATA => heard.extend(payload),
            RST_STREAM => bail!("the stream was reset: {payload:?}"),
            _ => continue,
        }
        if flags & END_STREAM != 0 {
            return Ok(heard);
        }
    }
}

/// Kind, flags and payload of the next frame.
async fn read_frame<S>(stream: &mut S) -> Result<(u8, u8, Vec<u8>)>
where
    S: AsyncRead + Unpin,
{
    let mut head = [0; 9];
    stream.read_exact(&mut head).await?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload).await?;
    Ok((head[3], head[4], payload))
}

async fn answer<S>(stream: &mut S) -> Result<Answer>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        let Ok((kind, flags, payload)) = read_frame(stream).await else {
            return Ok(Answer::Closed);
        };
        match (kind, flags) {
            (SETTINGS, 0) => {
                let mut bytes = Vec::new();
                frame(&mut bytes, SETTINGS, ACK, 0, &[]);
                if stream.write_all(&bytes).await.is_err() {
                    return Ok(Answer::Closed);
                }
            }
            (HEADERS, _) if is_200(&payload) => return Ok(Answer::Accepted),
            (HEADERS, _) => return Ok(Answer::Refused),
            (RST_STREAM, _) => return Ok(Answer::Reset),
            (GOAWAY, _) => return Ok(Answer::Closed),
            _ => {}
        }
    }
}

/// Answers PINGs until a frame of this kind (and these flags) comes. The first stream must stay open. Returns whether
/// another stream was accepted meanwhile.
async fn until<S>(stream: &mut S, wanted: (u8, u8)) -> Result<bool>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut accepted = false;
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload).await?;
        match (head[3], head[4]) {
            seen if seen == wanted => return Ok(accepted),
            (PING, 0) => {
                let mut bytes = Vec::new();
                frame(&mut bytes, PING, ACK, 0, &payload);
                stream.write_all(&bytes).await?;
            }
            (RST_STREAM, _) if head[8] == 1 => bail!("the open stream was reset"),
            (HEADERS, _) => accepted |= is_200(&payload),
            _ => {}
        }
    }
}

/// Waits for GOAWAY on a connection whose first stream is open.
pub async fn until_goaway<S>(stream: &mut S) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    until(stream, (GOAWAY, 0)).await.map(drop)
}

/// Whether another stream is accepted. PINGs frame the question, so that no answer is an answer, and so that a server
/// that says GOAWAY twice, with a PING between (RFC 9113 section 6.8), has said it.
pub async fn takes_another<S>(stream: &mut S, fields: &[(&[u8], &[u8])]) -> Result<bool>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut accepted = false;
    for ask in [false, true] {
        let mut bytes = Vec::new();
        if ask {
            frame(&mut bytes, HEADERS, END_HEADERS, 3, &header_block(fields)?);
        }
        frame(&mut bytes, PING, 0, 0, b"question");
        stream.write_all(&bytes).await?;
        stream.flush().await?;
        accepted |= until(stream, (PING, ACK)).await?;
    }
    Ok(accepted)
}

/// The status is the first field; updates of the dynamic table's size (`001xxxxx`) may precede it.
fn is_200(block: &[u8]) -> bool {
    let first = block.iter().find(|byte| **byte >> 5 != 1);
    first == Some(&STATUS_200)
}

/// Appends a frame.
pub fn frame(bytes: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len())
        .unwrap_or(u32::MAX)
        .to_be_bytes();
    bytes.extend(&length[1..]);
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
}

/// Literal fields without indexing, names and values as they are (RFC 7541 section 6.2.2).
pub fn header_block(fields: &[(&[u8], &[u8])]) -> Result<Vec<u8>> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            length(&mut block, text.len())?;
            block.extend(*text);
        }
    }
    Ok(block)
}

/// An integer with a prefix of seven bits (RFC 7541 section 5.1), up to 254.
fn length(block: &mut Vec<u8>, value: usize) -> Result<()> {
    match u8::try_from(value) {
        Ok(small @ 0..=126) => block.push(small),
        Ok(rest @ 127..=254) => block.extend([127, rest - 127]),
        _ => bail!("{value} bytes are too long for this encoder"),
    }
    Ok(())
}
