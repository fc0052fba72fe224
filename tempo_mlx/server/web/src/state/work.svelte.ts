/** What the server does for this page, one thing at a time; how it is, and what went wrong. */

import * as api from '../lib/api'
import { ApiError } from '../lib/api'
import type { Form } from './form.svelte'
import type { RunView } from './view.svelte'

export type Activity =
  | { kind: 'idle' }
  | { kind: 'waiting'; position: number | null }
  | { kind: 'running' }
  | { kind: 'editing'; what: string }

/** milliseconds that the server has to stop when it is told */
const PATIENCE = 1000

export interface Problem {
  message: string
  code: string
  /** what "Try again" does */
  retry: (() => void) | null
  retryAt: number | null
}

export type Job = (id: string, signal: AbortSignal) => Promise<void>

export class Work {
  activity: Activity = $state.raw({ kind: 'idle' })
  notice: string | null = $state(null)
  /** for those who listen: that what was asked for has been done */
  done = $state('')
  problem: Problem | null = $state.raw(null)
  health: api.Health | 'unreachable' | null = $state.raw(null)
  private request: { id: string; abort: AbortController; stopped?: number } | null = null
  /** the server did not answer when it was last asked how it is */
  private missed = false

  /** `onanswer`: what there is to do whenever the server says how it is */
  constructor(
    private form: Form,
    private onanswer: () => void,
  ) {}

  readonly busy: boolean = $derived(this.activity.kind !== 'idle')
  /** what is going on, in a few words */
  readonly status: string = $derived.by(() => {
    const { activity, health } = this
    if (activity.kind === 'editing') return activity.what
    if (activity.kind !== 'waiting') return ''
    if (activity.position !== null) return `Waiting, ${activity.position} in front`
    const busy = health !== null && health !== 'unreachable' && health.waiting > 0
    return busy ? 'Waiting for other requests' : 'Reading the prompt'
  })

  /**
   * One thing at a time: run `job` under a request id, and put whatever goes wrong where the reader sees it. `held`: the
   * run whose session it needs; `done`: what there is to do however it ended.
   */
  async attempt(held: () => RunView | null, retry: () => void, job: Job, done: () => void): Promise<void> {
    const request = { id: api.requestId(), abort: new AbortController() }
    this.request = request
    this.problem = null
    this.notice = null
    this.done = ''
    if (this.activity.kind === 'idle') this.activity = { kind: 'waiting', position: null }
    const look = setTimeout(() => void this.watchHealth(), 1000) // is it the queue that takes so long?
    try {
      await job(request.id, request.abort.signal).catch((error: unknown) => {
        const view = held()
        if (!isLost(error) || !view?.session) throw error
        view.session = null // evicted, or the server was restarted: the job opens the run there again
        return job(request.id, request.abort.signal)
      })
    } catch (error) {
      if (!request.abort.signal.aborted) this.fail(error, retry)
    } finally {
      done()
      clearTimeout(look)
      this.request = null
      this.activity = { kind: 'idle' }
      this.done = this.problem ? '' : 'Done.' // a problem is told as well
      void this.watchHealth()
    }
  }

  /** Ask the server to end it; the stream then closes by itself, with what was generated. */
  async stop(): Promise<void> {
    const request = this.request
    if (!request) return
    // It was asked for, and nobody answers: leave.
    if (performance.now() - (request.stopped ?? Infinity) > PATIENCE) return request.abort.abort()
    request.stopped ??= performance.now()
    try {
      await api.cancelRequest(request.id)
    } catch {
      request.abort.abort() // it never got so far, or the server is gone: closing the connection cancels as well
    }
  }

  fail(error: unknown, retry: () => void): void {
    if (!(error instanceof ApiError)) throw error
    if (error.code === 'cancelled') return
    if (error.code === 'unreachable' || error.code === 'cut_off') this.health = 'unreachable'
    const name = error.param?.replace(/^tempo\./, '')
    if (error.code === 'invalid_value' && name) this.form.refuse(name, error.message)
    const lost = isLost(error)
    const canRetry = lost || [0, 401, 429, 503].includes(error.status)
    this.problem = {
      message: lost ? 'The server no longer holds this run. It can be opened there again.' : error.message,
      code: error.code,
      retry: canRetry ? retry : null,
      retryAt: error.retryAfter === null ? null : Date.now() + 1000 * error.retryAfter,
    }
  }

  async watchHealth(): Promise<void> {
    try {
      this.health = await api.getHealth()
      await this.form.learn(this.health.models)
      const { problem } = this
      if (!this.form.table && problem?.code === 'unreachable') problem.retry?.()
      else if (this.missed && ['unreachable', 'cut_off'].includes(problem?.code ?? '')) this.problem = null // it is over
      this.missed = false
      this.onanswer()
    } catch {
      this.missed = true
      this.health = 'unreachable'
    }
  }
}

/** The server no longer holds the session: it was evicted, or the server was started again. */
export function isLost(error: unknown): boolean {
  return error instanceof ApiError && error.code.startsWith('session_')
}
