//! InitProducerId: a fresh id for every idempotent producer. Transactional ids are not served yet, and
//! say so instead of letting the client wait.

use flumen_protocol::error_code::ErrorCode;
use kafka_protocol::messages::{InitProducerIdRequest, InitProducerIdResponse};

use crate::dispatch::{Answer, Request, RequestError};

pub async fn init_producer_id(request: &Request<'_>) -> Result<Answer, RequestError> {
    let init: InitProducerIdRequest = request.decode()?;
    let mut response = InitProducerIdResponse::default();
    response.producer_id.0 = -1;
    response.producer_epoch = -1;
    match &init.transactional_id {
        Some(id) if id.is_empty() => response.error_code = ErrorCode::INVALID_REQUEST.0,
        Some(_) => response.error_code = ErrorCode::TRANSACTIONAL_ID_AUTHORIZATION_FAILED.0,
        // Without a transactional id Kafka gives a new id even when the producer names its old one.
        None => match request.shard.node.next_producer_id().await {
            Ok(id) => {
                response.producer_id.0 = id;
                response.producer_epoch = 0;
            }
            Err(error) => response.error_code = error.0,
        },
    }
    request.answer(&response)
}
