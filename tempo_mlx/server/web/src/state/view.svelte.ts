/** One run on the page, live or finished, with what the views derive from it. */

import { requestId, type Asked, type Session, type StreamStart, type StreamStep } from '../lib/api'
import type { Answers } from '../lib/answers'
import { Lattice, type Member } from '../lib/lattice'
import type { Phrase, Run } from '../lib/run'
import type { Shown } from '../lib/shown'
import { briefly, printed, printedBest, segment, type Segment } from '../lib/text'

let count = 0

export class RunView {
  readonly key = ++count
  /** under which this browser keeps it */
  id = requestId()
  name = $state('')
  live = $state(false)
  /** everything but the steps, which the lattice holds */
  run: Run = $state.raw(emptyRun())
  lattice: Lattice = $state.raw(new Lattice())
  /** raised whenever the lattice changes in place */
  version = $state(0)
  /** of all steps; while a long run streams they come a little later than the lattice, and so do charts and map */
  segments: Segment[] = $state.raw([])
  /** the best reading, cut where others differ from it; empty where nobody has read it so */
  phrases: Phrase[] = $state.raw([])
  /** what its texts answer, where it was asked */
  answers: Answers | null = $state.raw(null)
  /** what follows the phrases while the run grows, and may still change */
  tail = $state('')
  /** what the model thought before it answered, as far as it has come */
  reasoning = $state('')
  /** the server tells what the text is while the run grows */
  private told = $state(false)
  /** the run that this one was before another word was taken, and which */
  readonly origin: { view: RunView; taken: string } | null
  /** one member a step */
  best: number[] = $state.raw([])
  session: Omit<Session, 'run' | 'phrases'> | null = $state.raw(null)
  /** index of the member that the inspector shows */
  selected: number | null = $state(null)
  /** which of the run's paths the lattice shows instead of the best */
  traced: number | null = $state(null)
  private tracedPath: number[] = $state.raw([])
  /** wall-clock of each step, for those that were watched */
  seconds: (number | null)[] = []
  private settled = nothing()
  private stale = new Set<number>()
  private frame = 0
  private written = 0

  constructor(name = '', origin: RunView['origin'] = null) {
    this.name = name
    this.origin = origin
  }

  static of({ run, phrases, answers }: Shown, name: string): RunView {
    const view = new RunView(name)
    view.answers = answers
    if (run) view.load(run, phrases)
    else view.run = { ...emptyRun(), prompt: { text: answers?.question ?? '', token_ids: [] } }
    return view
  }

  /** The first of the runs that words were taken in to get here. */
  get root(): RunView {
    return this.origin ? this.origin.view.root : this
  }

  /** for taking away */
  get shown(): Shown {
    const run = this.answers && this.lattice.length === 0 ? null : this.run
    return { run, phrases: this.phrases, answers: this.answers }
  }

  get member(): Member | null {
    return this.selected === null ? null : (this.lattice.members[this.selected] ?? null)
  }

  /** The best reading. */
  readonly text: string = $derived.by(() => {
    if (!this.live && (this.run.final_text || this.reasoning)) return this.run.final_text
    if (this.phrased) return this.phrases.map(({ text }) => text).join('') + this.tail
    return this.segments.map(printedBest).join('')
  })

  get phrased(): boolean {
    return this.live ? this.told : this.phrases.length > 0
  }

  /** The path to draw. */
  get path(): number[] {
    return this.traced === null ? this.best : this.tracedPath
  }

  trace(which: number | null, ids: readonly number[]): void {
    this.traced = which
    this.tracedPath = which === null ? [] : this.lattice.locate(ids)
  }

  /** The answers so far, and at last the run that they are of. */
  answer({ run, ...answers }: Asked, last: boolean): void {
    this.answers = answers
    this.live = !last
    if (run) this.load(run, [])
  }

  /** What a stream says before its first step. */
  describe({ model, decoder, config, prompt }: StreamStart): void {
    if (this.lattice.length === 0) this.run = { ...emptyRun(), model, decoder, config, prompt }
  }

  add(event: StreamStep): void {
    const { removed, scores, stats, phrases, tail, reasoning, reasoning_tail, ...step } = event
    if (!this.live) this.settled = nothing() // a stream tells all of it
    if (phrases) {
      this.told = true
      this.settled = {
        phrases: [...this.settled.phrases, ...phrases],
        tail: tail ?? '',
        reasoning: this.settled.reasoning + (reasoning ?? ''),
        reasoning_tail: reasoning_tail ?? '',
      }
    }
    this.live = true
    for (const { slot, removed_after, removed_why, posterior, attention } of removed) {
      this.touch(this.lattice.update(slot, { removed_after, removed_why, posterior, attention }))
    }
    for (const [slot, posterior, attention] of scores) {
      const known = this.lattice.memberAtSlot(slot)?.token
      if (known) Object.assign(known, { posterior, attention }) // no view but the open ones depends on it
    }
    const first = this.lattice.length === 0 // the prefill has done its work
    this.seconds[this.lattice.length] = first ? null : stats.step_seconds
    this.touch(this.lattice.length)
    this.lattice.append(step)
    this.frame ||= requestAnimationFrame(() => this.refresh(this.textIsDue()))
  }

  /** The whole run, as the server knows it: replaces what was streamed. */
  load(run: Run, phrases: Phrase[]): void {
    this.settled = { ...nothing(), phrases, reasoning: run.reasoning ?? '' }
    const chosen = this.member
    cancelAnimationFrame(this.frame)
    this.lattice = Lattice.of(run)
    this.run = run
    this.live = false
    this.seconds.length = Math.min(this.seconds.length, run.steps.length)
    this.segments = []
    this.best = []
    this.trace(null, [])
    for (let step = 0; step < run.steps.length; step++) this.stale.add(step)
    this.refresh()
    this.selected = chosen && this.find(chosen)
  }

  setSession({ run, phrases, ...session }: Session): void {
    this.session = session
    this.load(run, phrases)
  }

  /** Stop watching: what has come stays. */
  end(): void {
    cancelAnimationFrame(this.frame)
    this.refresh()
    if (this.live) {
      const { run, phrases } = this.soFar()
      this.settled = { ...nothing(), phrases, reasoning: run.reasoning ?? '' }
      this.publish()
      this.run = run
    }
    this.live = false
  }

  /** What there is, as if it had been stopped here. */
  soFar(): { run: Run; phrases: Phrase[] } {
    const { length, steps } = this.lattice
    if (!this.live) return { run: { ...this.run, steps }, phrases: this.phrases }
    const { tail, reasoning, reasoning_tail } = this.settled
    const rest = { text: tail, share: null, alternatives: [], start: length, end: length }
    const phrases = tail ? [...this.settled.phrases, rest] : this.settled.phrases
    const text = this.segments.map(printed).join('')
    const final_text = this.told
      ? phrases.map((phrase) => phrase.text).join('')
      : this.segments.map(printedBest).join('')
    const thought = reasoning + reasoning_tail || null
    return {
      run: { ...this.run, finish_reason: 'cancelled', steps: [...steps], text, final_text, reasoning: thought },
      phrases,
    }
  }

  private find(member: Member): number | null {
    const same = this.lattice.steps[member.step] && this.lattice.membersOf(member.step)
    return same?.find((other) => other.token.id === member.token.id)?.index ?? null
  }

  private touch(step: number | null): void {
    if (step !== null) this.stale.add(step)
  }

  /** What shows the whole run takes the longer the longer it is; the lattice does not wait for that. */
  private textIsDue(): boolean {
    return this.lattice.length < 100 || performance.now() - this.written > 120
  }

  private refresh(text = true): void {
    this.frame = 0
    const best = this.bestPath()
    for (let step = 0; step < best.length; step++) if (best[step] !== this.best[step]) this.stale.add(step)
    this.best = best
    this.version++
    if (!text) return
    this.written = performance.now()
    this.publish()
    const segments = this.segments.slice(0, this.lattice.length)
    for (const step of this.stale) {
      if (step < this.lattice.length) segments[step] = segment(this.lattice, step, best[step])
    }
    this.stale.clear()
    this.segments = segments
  }

  private publish(): void {
    this.phrases = this.settled.phrases
    this.tail = this.settled.tail
    this.reasoning = this.settled.reasoning + this.settled.reasoning_tail
  }

  /** Of decoders that search, the first recorded path; else the most probable one. */
  private bestPath(): number[] {
    const recorded = this.run.paths[0]
    if (recorded && this.run.decoder !== 'superposed') {
      const path = this.lattice.locate(recorded.token_ids)
      if (path.length > 0) return path
    }
    return this.lattice.bestPath()
  }
}

/** Of the reasoning and the answer: what has settled, and what follows it. */
function nothing(): { phrases: Phrase[]; tail: string; reasoning: string; reasoning_tail: string } {
  return { phrases: [], tail: '', reasoning: '', reasoning_tail: '' }
}

/** The first words of the prompt. */
export function nameOf(run: { prompt: { text: string } }): string {
  return briefly(run.prompt.text, 32) || 'Run'
}

function emptyRun(): Run {
  return {
    format: 'tempo-mlx/run',
    version: 1,
    model: {},
    versions: {},
    decoder: 'superposed',
    config: {},
    prompt: { text: '', token_ids: [] },
    steps: [],
    tree: null,
    reasoning: null,
    text: '',
    final_text: '',
    paths: [],
    finish_reason: 'cancelled',
    timing: {},
  }
}
