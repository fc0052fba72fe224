/** What the server is asked to make: texts that grow, answers, and changes in the lattice of a text. */

import { tick } from 'svelte'
import * as api from '../lib/api'
import type { StepDetail } from '../lib/api'
import type { Alternative, Phrase } from '../lib/run'
import type { Filled } from '../lib/settings'
import type { App } from './app.svelte'
import { nameOf, RunView } from './view.svelte'
import { isLost, type Job } from './work.svelte'

/** steps that a text goes on for, at least, when another word is taken in it */
const GO_ON = 20

export class Decoding {
  constructor(private app: App) {}

  /** why the run can only be looked at, in a sentence; null where the server can open it as a session, '' without one */
  readonly fixed: string | null = $derived.by(() => {
    const { current } = this.app.runs
    return current && this.whyFixed(current)
  })
  readonly interactive: boolean = $derived.by(() => !!this.app.runs.current && this.fixed === null)

  whyFixed(view: RunView): string | null {
    const { table } = this.app.form
    if (!table || view.shown.run === null) return '' // given answers were weighed: there is no text
    const needed = 'Branching, pinning and removing'
    const decoders = table.session_decoders
    if (decoders.length === 0) return `${needed} need sessions, which this server does not keep.`
    if (!decoders.includes(view.run.decoder)) return `${needed} need a run with decoder ${decoders.join(' or ')}.`
    if (view.run.config.early_exit === true) return `${needed} need every layer, so a run without early exit.`
    return null
  }

  // --- texts that grow ---

  async generate(): Promise<void> {
    const { app } = this
    const { form, work, runs } = app
    const { filled } = form
    if (work.busy || !filled) return
    if (form.prompt.trim() === '') form.refuse('prompt', 'Write a prompt first.')
    if (form.wrong) return showWrong()
    app.writeAddress()
    const body = form.body()
    const view = new RunView(nameOf({ prompt: { text: form.prompt } }))
    const retry = () => void this.generate()
    await this.attempt(view, retry, (id, signal) =>
      form.asking
        ? this.watchAnswers(view, api.stream('ask/stream', form.question(), id, signal))
        : this.decode(view, body, filled, id, signal, () => runs.show(view)),
    )
  }

  /** Generate what follows a text of a run, under the settings of the form. */
  async goOnWith(text: string): Promise<void> {
    const { form, work, runs } = this.app
    if (work.busy || !runs.current) return
    form.prompt = runs.current.run.prompt.text + text
    await this.generate()
  }

  /** Run what `body` asks for, which the form's values are part of. `begun`: there is something to be seen. */
  async decode(
    view: RunView,
    body: object,
    { values }: Filled,
    id: string,
    signal: AbortSignal,
    begun: () => void,
  ): Promise<void> {
    // A session has no end, so it reads no paths off (the finished run can still be opened as one), and it goes
    // through the whole model.
    const plain = Number(values.paths ?? 0) > 0 || values.early_exit === true
    if (plain || !this.app.form.table?.session_decoders.includes(String(values.decoder))) {
      await this.watch(view, api.stream('generate/stream', body, id, signal), begun)
      return
    }
    view.setSession(await api.createSession({ ...body, steps: 0 }, id, signal))
    begun()
    await this.extend(view, Number(values.max_tokens), id, signal)
  }

  /** Go on with a run by some steps. One that the server does not hold is replayed there first. */
  async extend(view: RunView, steps: number, id: string, signal: AbortSignal): Promise<void> {
    await this.ensureSession(view, id, signal)
    if (view.session!.finished === 'stop' || steps < 1) return
    await this.watch(view, api.stream(`sessions/${view.session!.id}/continue/stream`, { steps }, id, signal))
  }

  async continue(steps: number): Promise<void> {
    const { runs, work } = this.app
    const view = runs.current
    if (!view || work.busy) return
    const retry = () => void this.continue(steps)
    await this.attempt(view, retry, (id, signal) => this.extend(view, steps, id, signal))
  }

  /** Say `other` in place of a phrase and go on from there; the text as it was stays beside the new one. */
  async take(phrase: Phrase, other: Alternative): Promise<void> {
    const { runs, work } = this.app
    const old = runs.current
    if (!old || work.busy) return
    const view = new RunView(old.name, { view: old, taken: other.text.trim() })
    work.activity = { kind: 'editing', what: `Taking “${other.text.trim()}”` }
    const retry = () => void this.take(phrase, other)
    await this.attempt(view, retry, async (id, signal) => {
      await this.part(old, view, phrase, other, id, signal)
      runs.show(view)
      await this.extend(view, Math.max(GO_ON, old.lattice.length - view.lattice.length), id, signal)
    })
  }

  /** Let `view` be `old` up to a phrase, and then what is said in its place. */
  async part(
    old: RunView,
    view: RunView,
    phrase: Phrase,
    other: Alternative,
    id: string,
    signal: AbortSignal,
  ): Promise<void> {
    if (view.lattice.length > 0) return // it was done before the session was lost
    const [token_id, ...then] = other.slots.flatMap((slot) => old.lattice.memberAtSlot(slot ?? -1)?.token.id ?? [])
    await this.ensureSession(old, id, signal)
    const step = phrase.start
    view.setSession(await api.editSession(old.session!.id, 'branch', { step, token_id, then }))
    old.session = null // it goes on with the new text; what it was is kept whole, and can be opened again
  }

  private async watch(view: RunView, events: AsyncGenerator<api.StreamEvent>, begun?: () => void): Promise<void> {
    const { work } = this.app
    let phrases: Phrase[] = []
    for await (const { event, data } of events) {
      if (event === 'queued') work.activity = { kind: 'waiting', position: data.position }
      else if (event === 'start') {
        view.describe(data)
        begun?.()
      } else if (event === 'step') {
        if (work.activity.kind !== 'running') work.activity = { kind: 'running' }
        view.add(data)
      } else if (event === 'phrases') phrases = data.phrases
      else if (event === 'run') view.load(data, phrases)
      else if (event === 'session') view.setSession(data)
    }
  }

  private async watchAnswers(view: RunView, events: AsyncGenerator<api.StreamEvent>): Promise<void> {
    const { work, runs } = this.app
    for await (const { event, data } of events) {
      if (event === 'queued') work.activity = { kind: 'waiting', position: data.position }
      else if (event === 'step') work.activity = { kind: 'running' }
      else if (event === 'found' || event === 'answers') {
        view.answer(data, event === 'answers')
        runs.show(view)
      }
    }
  }

  // --- sessions: the lattice as something to work on ---

  branch(step: number, tokenId: number): Promise<void> {
    return this.edit('branch', { step, token_id: tokenId }, 'Branching')
  }

  pin(slot: number, pinned: boolean): Promise<void> {
    return this.edit('pin', { slot, pinned }, pinned ? 'Pinning' : 'Unpinning')
  }

  remove(slot: number): Promise<void> {
    return this.edit('remove', { slot }, 'Removing')
  }

  undo(): Promise<void> {
    return this.edit('undo', {}, 'Undoing')
  }

  redo(): Promise<void> {
    return this.edit('redo', {}, 'Redoing')
  }

  private async edit(action: string, body: object, what: string): Promise<void> {
    const { runs, work } = this.app
    const view = runs.current
    if (!view || work.busy) return
    work.activity = { kind: 'editing', what }
    await this.attempt(
      null,
      () => void this.edit(action, body, what),
      async (id, signal) => {
        await this.ensureSession(view, id, signal)
        view.setSession(await api.editSession(view.session!.id, action, body))
      },
    )
  }

  /** A member's next tokens and the reason it was kept or pruned, from the server. */
  async detail(view: RunView, step: number): Promise<StepDetail | null> {
    if (!view.session) return null
    try {
      return await api.getStep(view.session.id, step)
    } catch (error) {
      if (isLost(error)) {
        view.session = null
        if (view === this.app.runs.current) void this.open()
      } else this.app.work.fail(error, () => void this.open())
      return null
    }
  }

  /** Open a run that the server does not hold: it is replayed there. */
  async open(): Promise<void> {
    const { runs, work } = this.app
    const view = runs.current
    if (!view || work.busy) return
    work.activity = { kind: 'editing', what: 'Opening the run on the server' }
    await this.attempt(
      null,
      () => void this.open(),
      (id, signal) => this.ensureSession(view, id, signal),
    )
  }

  private async ensureSession(view: RunView, id: string, signal: AbortSignal): Promise<void> {
    if (!view.session) view.setSession(await api.createSession({ run: view.run }, id, signal))
  }

  /** `view`: what the job makes; null where it changes what is shown. However it ends, what there is then is kept. */
  private attempt(view: RunView | null, retry: () => void, job: Job): Promise<void> {
    const { runs, work } = this.app
    return work.attempt(
      () => runs.current,
      retry,
      job,
      () => {
        view?.end()
        if (view && !runs.all.includes(view)) runs.letGo(view)
        const changed = view ?? runs.current
        if (changed && runs.all.includes(changed)) void runs.keep(changed)
        runs.note()
      },
    )
  }
}

/** To the first field that holds what cannot be asked for, wherever it is folded away. */
async function showWrong(): Promise<void> {
  await tick()
  const field = document.querySelector<HTMLElement>('[aria-invalid="true"]')
  for (let box = field?.closest('details'); box; box = box.parentElement?.closest('details')) box.open = true
  field?.focus()
}
