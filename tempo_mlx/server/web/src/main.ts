import { mount } from 'svelte'
import './app.css'
import Page from './App.svelte'
import { parseRun, type Phrase, type Run } from './lib/run'
import { App } from './state/app.svelte'

// The page as built into one file carries a run; before anything is drawn it is its own template.
const holder = document.getElementById('run')
const content = holder?.textContent?.trim() ?? ''
const source = content && `<!doctype html>\n${document.documentElement.outerHTML}`

/** The run as phrases, which Python reads off it. */
function phrases(): Phrase[] {
  return JSON.parse(document.getElementById('phrases')?.textContent?.trim() || '[]') as Phrase[]
}

function embedded(): Run | null {
  return content ? parseRun(content) : null
}

async function template(): Promise<string> {
  return source || (await fetch('standalone.html')).text()
}

try {
  mount(Page, { target: document.getElementById('app')!, props: { app: new App(embedded(), phrases()), template } })
} catch (error) {
  document.getElementById('app')!.textContent = (error as Error).message
  throw error
}
