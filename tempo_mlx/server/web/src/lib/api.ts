/** The server's routes, and the events of a stream. */

import { createParser } from 'eventsource-parser'
import type { Answers } from './answers'
import type { Phrase, Rejected, Removal, Run, Step, Token, Values } from './run'
import type { SettingsTable } from './settings'
import { inTab } from './storage'

/** A failed call. `status` 0: the server did not answer at all. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    message: string,
    /** the setting that is wrong */
    readonly param: string | null = null,
    /** seconds after which another try makes sense */
    readonly retryAfter: number | null = null,
  ) {
    super(message)
  }
}

export interface Health {
  status: 'ok' | 'loading' | 'dead' | 'stalled' | 'shutting_down'
  model: string
  /** the state of each */
  models: Record<string, string>
  version: string
  running: number
  waiting: number
}

/** A model that the server has, as `GET /v1/models` lists it. What is not known before it is loaded is null. */
export interface Model {
  id: string
  tempo: {
    state: string
    family: string | null
    context_length: number | null
    memory_bytes: number | null
  }
}

export interface Session {
  id: string
  expires_at: number
  run: Run
  phrases: Phrase[]
  finished: 'stop' | 'length' | null
  pinned: number[]
  undo: string[]
  redo: string[]
}

export interface NextToken {
  id: number
  text: string
  probability: number
}

export interface MemberDetail extends Token {
  status: 'kept' | 'removed' | 'unattended' | 'end'
  pinned: boolean
  why: string
  next: NextToken[]
}

export interface StepDetail {
  step: number
  tokens: MemberDetail[]
  rejected: Rejected[]
}

export interface StreamStart {
  request_id: string
  model: Values
  decoder: string
  config: Values
  prompt: { text: string; token_ids: number[] }
}

export interface StreamStep extends Step {
  removed: (Pick<Token, 'removed_after' | 'posterior' | 'attention'> & {
    slot: number
    removed_why: Removal | null
  })[]
  /** of a lattice: those that have settled since the last event, and what follows them as it is now */
  phrases?: Phrase[]
  tail?: string
  /** where the model thinks: the same of its reasoning; phrases and tail are then the answer's */
  reasoning?: string
  reasoning_tail?: string
  scores: [slot: number, posterior: number | null, attention: number | null][]
  stats: { step_seconds: number; elapsed_seconds: number; tokens_per_second: number }
}

export type StreamEvent =
  | { event: 'queued'; data: { request_id: string; position: number } }
  | { event: 'start'; data: StreamStart }
  | { event: 'step'; data: StreamStep }
  | { event: 'heartbeat'; data: { state: 'queued' | 'running' } }
  | { event: 'phrases'; data: { phrases: Phrase[] } }
  | { event: 'found'; data: Asked }
  | { event: 'answers'; data: Asked }
  | { event: 'run'; data: Run }
  | { event: 'session'; data: Session }

/** what a stream ends with */
const LAST = ['run', 'answers', 'session']

/** run: none before the last, nor where given answers were weighed */
export type Asked = Answers & { run: Run | null }

const KEY = 'tempo-mlx.api-key'

/** The key for servers that ask for one; kept for this tab only. */
export function apiKey(): string {
  return inTab.get(KEY) ?? ''
}

export function setApiKey(key: string): void {
  if (key) inTab.set(KEY, key)
  else inTab.remove(KEY)
}

export function requestId(): string {
  return crypto.getRandomValues(new Uint32Array(4)).reduce((id, n) => id + n.toString(16).padStart(8, '0'), 'web-')
}

export const getSettings = (model?: string): Promise<SettingsTable> =>
  call('GET', model === undefined ? 'settings' : `settings?model=${encodeURIComponent(model)}`)
export const getModels = (): Promise<{ data: Model[] }> => call('GET', 'v1/models')
export const cancelRequest = (id: string): Promise<unknown> => call('DELETE', `requests/${id}`)
export const createSession = (body: object, id: string, signal: AbortSignal): Promise<Session> =>
  call('POST', 'sessions', body, id, signal)
export const getStep = (session: string, step: number): Promise<StepDetail> =>
  call('GET', `sessions/${session}/steps/${step}`)
const getSession = (session: string): Promise<Session> => call('GET', `sessions/${session}`)
/** As it is, if it is there. It is busy until the server sees that the page that used it is gone, or while one does. */
export async function findSession(session: string): Promise<Session | 'busy' | null> {
  for (let tries = 0; tries < 20; tries++) {
    try {
      return await getSession(session)
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 409) return null
      await new Promise((resolve) => setTimeout(resolve, 250))
    }
  }
  return 'busy'
}
export const deleteSession = (session: string): Promise<unknown> => call('DELETE', `sessions/${session}`)
export const getExample = (): Promise<{ run: Run; phrases: Phrase[] }> => call('GET', 'example.json')
export const readPhrases = (run: Run): Promise<{ phrases: Phrase[] }> => call('POST', 'phrases', { run })
export const editSession = (session: string, action: string, body: object): Promise<Session> =>
  call('POST', `sessions/${session}/${action}`, body)

/** Health is an answer even when it is bad news. */
export async function getHealth(): Promise<Health> {
  const response = await send('GET', 'health')
  if (response.ok || response.status === 503) return (await response.json()) as Health
  throw await errorOf(response)
}

async function call<T>(method: string, path: string, body?: object, id?: string, signal?: AbortSignal): Promise<T> {
  const response = await send(method, path, body, id, signal)
  if (!response.ok) throw await errorOf(response)
  if (response.status === 204) return undefined as T
  return (await response.json().catch((error: unknown) => {
    throw signal?.aborted ? error : gone() // it went away in the midst of its answer
  })) as T
}

async function send(method: string, path: string, body?: object, id?: string, signal?: AbortSignal): Promise<Response> {
  const headers: Record<string, string> = {}
  if (body) headers['Content-Type'] = 'application/json'
  if (id) headers['X-Request-ID'] = id
  // No header holds other characters, nor does any key: the server then says that it is wrong.
  if (apiKey()) headers.Authorization = `Bearer ${apiKey().replace(/[^ -~]/g, '?')}`
  try {
    return await fetch(path, { method, headers, body: body && JSON.stringify(body), signal, cache: 'no-store' })
  } catch (error) {
    if (signal?.aborted) throw error
    throw gone()
  }
}

export function gone(): ApiError {
  return new ApiError(0, 'unreachable', 'The server does not answer. Is it still running?')
}

async function errorOf(response: Response): Promise<ApiError> {
  const retry = Number(response.headers.get('Retry-After')) || null
  try {
    const { error } = (await response.json()) as { error: { message: string; code: string; param: string | null } }
    return new ApiError(response.status, error.code, error.message, error.param, retry)
  } catch {
    return new ApiError(response.status, 'unknown', `The server answered ${response.status} ${response.statusText}.`)
  }
}

/** Events of a stream, in order. Ends after `run`, `answers` or `session`; an `error` event is thrown. */
export async function* stream(
  path: string,
  body: object,
  id: string,
  signal: AbortSignal,
): AsyncGenerator<StreamEvent, void, undefined> {
  const response = await send('POST', path, body, id, signal)
  if (!response.ok) throw await errorOf(response)
  const events: { event: string; data: string }[] = []
  const parser = createParser({ onEvent: ({ event, data }) => events.push({ event: event ?? '', data }) })
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader()
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(() => {
        throw signal.aborted ? new DOMException('aborted', 'AbortError') : gone()
      })
      if (value) parser.feed(value)
      for (const { event, data } of events.splice(0)) {
        const content = JSON.parse(data) as never
        if (event === 'error') throw streamError(content)
        yield { event, data: content } as StreamEvent
        if (LAST.includes(event)) return
      }
      if (done) throw new ApiError(0, 'cut_off', 'The stream broke off before the run was complete.')
    }
  } finally {
    void reader.cancel().catch(() => undefined)
  }
}

function streamError(data: {
  status?: number
  error: { message: string; code: string; param: string | null }
}): ApiError {
  return new ApiError(data.status ?? 500, data.error.code, data.error.message, data.error.param)
}
