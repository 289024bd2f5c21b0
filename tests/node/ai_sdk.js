// Scenarios of the AI SDK: `node ai_sdk.js NAME` prints what came of it as JSON.
import { createOpenAI } from "@ai-sdk/openai";
import { Output, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const model = createOpenAI()("m");
const get_weather = tool({
  description: "The weather in a city.",
  inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => `sunny in ${city}`,
});
const settings = { model, system: "Be helpful.", tools: { get_weather }, stopWhen: stepCountIs(5), maxRetries: 0 };
const [question, next] = ["What is the weather in Paris?", "And in Rome?"].map((content) => ({ role: "user", content }));

async function plain(options) {
  const { text, response, totalUsage, finishReason, providerMetadata } = await generateText({ ...settings, ...options });
  return { text, deltas: "", response, totalUsage, finishReason, providerMetadata };
}

async function streamed(options) {
  const errors = [];
  const result = streamText({ ...settings, ...options, onError: ({ error }) => errors.push(error) });
  const deltas = [];
  for await (const delta of result.textStream) deltas.push(delta);
  if (errors.length > 0) throw errors[0];
  const whole = { text: await result.text, response: await result.response, totalUsage: await result.totalUsage };
  const end = { finishReason: await result.finishReason, providerMetadata: await result.providerMetadata };
  return { ...whole, ...end, deltas: deltas.join("") };
}

function told({ text, deltas, totalUsage, finishReason }) {
  return { text, deltas, usage: totalUsage.totalTokens, finishReason };
}

const openai = (options) => ({ providerOptions: { openai: options } });

// The second run is told the messages of the first; what is stored, the SDK names by its id.
async function messages(run, options = {}) {
  const first = await run({ messages: [question], ...options });
  const second = await run({ messages: [question, ...first.response.messages, next], ...options });
  return [told(first), told(second)];
}

// A system message would be an input item of every request, and so be kept with each; instructions are not.
async function chain(run) {
  const instructed = (options) => ({ system: undefined, ...openai({ instructions: "Be helpful.", ...options }) });
  const first = await run({ messages: [question], ...instructed({}) });
  const { responseId } = first.providerMetadata.openai;
  return [told(first), told(await run({ messages: [next], ...instructed({ previousResponseId: responseId }) }))];
}

const unstored = openai({ store: false, include: ["reasoning.encrypted_content"] });

const scenarios = {
  plain_messages: () => messages(plain),
  streamed_messages: () => messages(streamed),
  plain_unstored: () => messages(plain, unstored),
  streamed_unstored: () => messages(streamed, unstored),
  plain_chain: () => chain(plain),
  streamed_chain: () => chain(streamed),
  parsed: async () => {
    const output = Output.object({ schema: z.object({ city: z.string() }) });
    return (await generateText({ model, prompt: "Where?", output, maxRetries: 0 })).output;
  },
};

console.log(JSON.stringify(await scenarios[process.argv[2]]()));
