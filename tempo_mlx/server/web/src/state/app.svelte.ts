/** The page, in its parts, and what its address says. One instance, made in main.ts and handed down as a context. */

import { readLink, writeLink } from '../lib/settings'
import type { Title } from '../lib/shelf'
import { Decoding } from './decoding.svelte'
import { Form, type Place } from './form.svelte'
import { Runs } from './runs.svelte'
import { Talks } from './talks.svelte'
import { RunView } from './view.svelte'
import { Work } from './work.svelte'

/** the address of a conversation, or of a new one */
const CONVERSATION = /^#conversation(?:=([\w-]+))?$/

export class App {
  readonly form = new Form()
  readonly work = new Work(this.form, () => void this.talks.takeUp())
  readonly runs = new Runs(this.form, this.work)
  readonly decoding = new Decoding(this)
  readonly talks: Talks = new Talks(this)
  /** the address as this page wrote or read it last */
  private link = ''

  async start(): Promise<void> {
    try {
      await this.form.load()
      this.work.problem = null
      await this.arrive()
    } catch (error) {
      this.work.fail(error, () => void this.start())
    }
  }

  /** Show what the address says, or else what this tab showed last, or else the example. */
  async arrive(): Promise<void> {
    await this.readAddress()
    if (this.form.place === 'text') await this.runs.begin(location.hash.length < 2)
  }

  /** Take prompt and settings from the address, unless they are what the page shows. */
  private async readAddress(): Promise<void> {
    const { form, work } = this
    if (!form.table || location.hash === this.link) return
    this.link = location.hash
    const talk = CONVERSATION.exec(location.hash)
    form.place = talk ? 'talk' : 'text'
    if (talk) return this.talks.show(talk[1] ?? null, false)
    if (location.hash.length < 2) return
    const { prompt, chosen, unknown } = readLink(form.table, location.hash)
    form.prompt = prompt
    form.chosen = chosen
    work.notice =
      unknown.length > 0 ? `The link holds settings that this server does not know: ${unknown.join(', ')}.` : null
  }

  /** `visit`: to where the way back leads from here. */
  writeAddress(visit = false): void {
    const { form } = this
    if (!form.table) return
    const { open } = this.talks
    if (form.place === 'text') this.link = writeLink(form.table, form.prompt, form.chosen)
    else this.link = open ? `#conversation=${open.id}` : '#conversation'
    if (this.link === location.hash) return
    if (visit) history.pushState(null, '', this.link)
    else history.replaceState(null, '', this.link)
  }

  /** Go to the text, or to the conversation, as it was left. */
  async goTo(place: Place): Promise<void> {
    this.form.place = place
    this.writeAddress(true)
    if (place === 'talk') await this.talks.show(this.talks.open?.id ?? null)
    else await this.runs.begin(true)
  }

  /** Open a run from a file, or one that this browser keeps: as a text, wherever the reader is. */
  async open(run: File | Title): Promise<void> {
    if (this.form.place !== 'text') await this.goTo('text')
    await (run instanceof File ? this.runs.importFile(run) : this.runs.openKept(run))
  }

  /** An answer as a text by itself, to work on; in the conversation it stays as it is. */
  async openAlone(view: RunView): Promise<void> {
    const { run, phrases } = structuredClone(view.soFar())
    const copy = RunView.of({ run, phrases, answers: null }, view.name)
    copy.selected = view.selected
    await this.goTo('text')
    this.runs.show(copy)
    void this.runs.keep(copy)
  }
}
