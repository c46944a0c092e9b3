#include "tests/e2e/live_stream_testlib.h"

namespace altiplano::e2e {

namespace v1 = inference::v1;

v1::GenerateRequest Story(uint32_t tokens) {
  v1::GenerateRequest request;
  auto* message = request.mutable_chat()->add_messages();
  message->set_role(v1::ROLE_USER);
  message->set_content("Tell me a story.");
  request.mutable_sampling()->set_temperature(0);
  request.mutable_stopping()->set_max_new_tokens(tokens);
  request.mutable_stopping()->set_ignore_eos(true);
  return request;
}

LiveStream::LiveStream(cli::Client* client, uint32_t tokens) {
  thread_ = std::thread([this, client, request = Story(tokens)] {
    cli::Answer answer;
    status_ = client->StreamGenerate(
        request, [this](const v1::Delta&) { ++tokens_; }, &answer);
    tokens_ = answer.tokens;
    ended_ = true;
  });
}

LiveStream::~LiveStream() {
  if (thread_.joinable()) thread_.join();
}

bool LiveStream::WaitForFirstToken() {
  return Eventually([this] { return tokens_ > 0 || ended_; }) && tokens_ > 0;
}

const Status& LiveStream::End() {
  if (thread_.joinable()) thread_.join();
  return status_;
}

}  // namespace altiplano::e2e
