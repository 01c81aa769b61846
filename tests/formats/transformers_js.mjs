// Answers one question with transformers.js from a package's folder: node transformers_js.mjs MODULES FOLDER COUNT QUESTION
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const [modules, folder, count, question] = process.argv.slice(2);
const entry = createRequire(modules + '/').resolve('@huggingface/transformers');
const { AutoModelForCausalLM, AutoTokenizer, env } = await import(pathToFileURL(entry));

env.allowRemoteModels = false;
env.localModelPath = '';
const tokenizer = await AutoTokenizer.from_pretrained(folder);
const model = await AutoModelForCausalLM.from_pretrained(folder, {
    subfolder: '', dtype: 'fp32', device: 'cpu', use_external_data_format: true,
});
const messages = [{ role: 'user', content: question }];
const inputs = tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true });
const output = await model.generate({ ...inputs, max_new_tokens: +count, do_sample: false });
console.log(JSON.stringify({ prompt: inputs.input_ids.tolist()[0].map(Number), all: output.tolist()[0].map(Number) }));
