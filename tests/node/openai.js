// Scenarios of the official Node SDK: `node openai.js NAME` prints what came of it as JSON.
import OpenAI from "openai";
import { zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ maxRetries: 0 });
const model = "m";
const parameters = {
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
};
const get_weather = { type: "function", name: "get_weather", description: "The weather in a city.", parameters, strict: true };
const questions = ["What is the weather in Paris?", "And in Rome?"];

async function plain(body) {
  return { response: await client.responses.create(body), deltas: [] };
}

async function streamed(body) {
  const deltas = [];
  const events = client.responses.stream(body);
  events.on("response.output_text.delta", (event) => deltas.push(event.delta));
  return { response: await events.finalResponse(), deltas };
}

function output({ call_id, arguments: given }) {
  return { type: "function_call_output", call_id, output: `sunny in ${JSON.parse(given).city}` };
}

// Two runs in which each call is answered; every request sends what is new, and says by `link` what it continues.
async function runs(turn, link) {
  const told = [];
  let last = null;
  for (const question of questions) {
    let input = question;
    while (input.length > 0) {
      const body = { model, input, instructions: "Be helpful.", tools: [get_weather], ...link(last) };
      const { response, deltas } = await turn(body);
      input = response.output.filter((item) => item.type === "function_call").map(output);
      last = response;
      if (input.length === 0) told.push({ text: response.output_text, deltas: deltas.join(""), usage: response.usage.total_tokens });
    }
  }
  return told;
}

const chain = (last) => (last === null ? {} : { previous_response_id: last.id });

async function conversation(turn) {
  const { id } = await client.conversations.create();
  const told = await runs(turn, () => ({ conversation: id }));
  const kinds = [];
  for await (const item of client.conversations.items.list(id, { order: "asc", limit: 3 })) kinds.push(item.type);
  return { told, kinds };
}

async function parsed() {
  const format = zodTextFormat(z.object({ city: z.string() }), "place");
  const response = await client.responses.parse({ model, input: "Where?", text: { format } });
  return response.output_parsed;
}

// A response is kept with its input, and gone once it is deleted.
async function stored() {
  const { response } = await streamed({ model, input: "Who?" });
  const kept = await client.responses.retrieve(response.id);
  const items = [];
  for await (const item of client.responses.inputItems.list(response.id)) items.push(item.content[0].text);
  await client.responses.delete(response.id);
  const error = await client.responses.retrieve(response.id).catch((error) => error);
  return { text: kept.output_text, items, error: error.constructor.name };
}

async function background() {
  let response = await client.responses.create({ model, input: "Who?", background: true });
  const first = response.status;
  while (response.status === "queued" || response.status === "in_progress") {
    response = await client.responses.retrieve(response.id);
  }
  return { first, last: response.status, text: response.output_text };
}

const scenarios = {
  plain_chain: () => runs(plain, chain),
  streamed_chain: () => runs(streamed, chain),
  plain_conversation: () => conversation(plain),
  streamed_conversation: () => conversation(streamed),
  parsed,
  stored,
  background,
};

console.log(JSON.stringify(await scenarios[process.argv[2]]()));
