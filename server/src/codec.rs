//! How messages meet gRPC frames: prost's coding over small buffers.
//!
//! # Why not
//! tonic's own codec takes 8 KiB for each request and again for each answer. Most messages here have a few hundred bytes, and
//! a key or value of the request keeps the whole buffer alive.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::BufferSettings;
use tonic_prost::{ProstDecoder, ProstEncoder};

/// Bytes that a buffer begins with; it grows with its message. Small enough for the allocator's fast lists.
const BUFFER_BYTES: usize = 768;
/// Bytes of answers that a stream puts together before it sends.
const YIELD_BYTES: usize = 32 << 10;

/// The codec of all services, named in `build.rs`.
#[derive(Clone, Debug)]
pub struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> tonic::codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(BufferSettings::new(BUFFER_BYTES, YIELD_BYTES))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(BufferSettings::new(BUFFER_BYTES, YIELD_BYTES))
    }
}
