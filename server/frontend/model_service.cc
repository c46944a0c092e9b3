#include "server/frontend/model_service.h"

#include "server/frontend/unary.h"
#include "server/frontend/validate.h"

namespace altiplano {

namespace v1 = inference::v1;

namespace {

// What this front end can do with any model.
constexpr std::string_view kFeatures[] = {"streaming",      "logprobs",  "prompt_logprobs", "num_sequences",
                                          "seed",           "penalties", "logit_bias",      "stop_strings",
                                          "stop_token_ids", "echo",      "priority"};

void FillModel(const ServedModel& model, v1::Model* out) {
  out->set_name(model.name);
  out->set_architecture(model.architecture);
  out->set_parameters(model.parameters);
  out->set_max_context(static_cast<uint32_t>(model.max_context));
  out->set_vocab_size(static_cast<uint32_t>(model.vocab_size));
  out->set_weight_dtype(model.weight_dtype);
  out->set_kv_dtype(model.kv_dtype);
  out->set_tensor_parallel(static_cast<uint32_t>(model.tensor_parallel));
  out->set_pipeline_parallel(static_cast<uint32_t>(model.pipeline_parallel));
  for (TokenId id : model.eos_ids) out->add_eos_token_ids(static_cast<uint32_t>(id));
  for (std::string_view feature : kFeatures) out->add_features(std::string(feature));
  if (model.chat_format != nullptr) {
    out->set_chat_format(std::string(model.chat_format->name()));
    out->add_features("chat");
    if (model.chat_format->supports_tools()) out->add_features("tools");
  }
  for (const std::string& feature : model.features) out->add_features(feature);
}

}  // namespace

grpc::ServerUnaryReactor* ModelService::ListModels(grpc::CallbackServerContext* context,
                                                   const grpc::ByteBuffer* request, grpc::ByteBuffer* response) {
  return AnswerUnary<v1::ListModelsRequest, v1::ListModelsResponse>(
      context, request, response, [this](const v1::ListModelsRequest& in, v1::ListModelsResponse* out) {
        auto backend = state_->Loaded();
        if (!backend.ok()) return backend.status();
        // One model is one page, so no token was ever handed out.
        if (!in.page_token().empty()) return InvalidField("page_token", "was not given by this server");
        FillModel((*backend)->model, out->add_models());
        return OkStatus();
      });
}

grpc::ServerUnaryReactor* ModelService::GetModel(grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
                                                 grpc::ByteBuffer* response) {
  return AnswerUnary<v1::GetModelRequest, v1::Model>(context, request, response,
                                                     [this](const v1::GetModelRequest& in, v1::Model* out) {
                                                       auto backend = state_->Loaded();
                                                       if (!backend.ok()) return backend.status();
                                                       RETURN_IF_ERROR(ValidateModelName(in.name(), (*backend)->model));
                                                       FillModel((*backend)->model, out);
                                                       return OkStatus();
                                                     });
}

}  // namespace altiplano
