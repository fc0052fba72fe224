/** Serves the built page, and one run as a stream that is as fast as the page can take it. For measuring only. */

import { readFileSync } from 'node:fs'
import { createServer } from 'node:http'
import { WEB } from './browser.mjs'

const TYPES = {
  html: 'text/html',
  js: 'text/javascript',
  css: 'text/css',
  svg: 'image/svg+xml',
  json: 'application/json',
}

const number = (name, value) => ({
  name, group: 'lengths', audience: 'everyday', help: '', type: 'integer', many: false, optional: false, default: value, default_text: `${value}`,
  minimum: 0, maximum: null, above: null, below: null, choices: [], values_text: '', decoders: null, needs: null, implies: [],
}) // prettier-ignore
const decoder = {
  ...number('decoder', 'tree'),
  type: 'string',
  choices: ['tree'],
}
const SETTINGS = {
  model: 'canned', context_length: 1024, chat: false, presets: {}, ask: { decoder: 'enumerate' }, shortcuts: {}, decoders: ['tree'], session_decoders: [],
  groups: ['lengths'], settings: [number('seed', 42), number('max_tokens', 100), decoder],
} // prettier-ignore

/** `sent` comes when the stream has ended. @returns {Promise<{ url: string, sent: Promise<void>, close: () => void }>} */
export async function serveCanned(run, pause) {
  let ended
  const sent = new Promise((resolve) => (ended = resolve))
  const server = createServer(async (request, response) => {
    const path = request.url === '/' ? '/index.html' : request.url
    if (path === '/settings') return json(response, SETTINGS)
    if (path === '/health')
      return json(response, {
        status: 'ok',
        model: 'canned',
        models: {},
        running: 0,
        waiting: 0,
      })
    if (path === '/v1/models') return json(response, { data: [] })
    if (path === '/generate/stream') return stream(response, run, pause).then(ended)
    try {
      const body = readFileSync(`${WEB}dist${path}`)
      response.writeHead(200, { 'content-type': TYPES[path.split('.').pop()] }).end(body)
    } catch {
      response.writeHead(404).end()
    }
  })
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve))
  return {
    url: `http://127.0.0.1:${server.address().port}`,
    sent,
    close: () => server.close(),
  }
}

function json(response, value) {
  response.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify(value))
}

async function stream(response, run, pause) {
  response.writeHead(200, { 'content-type': 'text/event-stream' })
  const send = (event, data) => response.write(`event: ${event}\ndata: ${JSON.stringify(data)}\n\n`)
  send('start', {
    request_id: 'canned-run',
    model: run.model,
    decoder: run.decoder,
    config: run.config,
    prompt: run.prompt,
  })
  for (const step of run.steps) {
    const removed = run.steps
      .slice(Math.max(0, step.step - 8), step.step)
      .flatMap((s) => s.tokens.filter((t) => t.removed_after === step.step - 1).map((t) => ({ ...t, step: s.step })))
    const tokens = step.tokens.map((token) => ({
      ...token,
      removed_after: null,
      removed_why: null,
    }))
    const stats = {
      step_seconds: pause / 1000,
      elapsed_seconds: 0,
      tokens_per_second: 1000 / pause,
    }
    send('step', { ...step, tokens, removed, scores: [], stats })
    await new Promise((resolve) => setTimeout(resolve, pause))
  }
  send('run', run)
  response.end()
}
