/** The text as it is read: phrases whose forks open, can be taken, and go on from there. The real server and model. */

import assert from 'node:assert/strict'
import { after, before, test } from 'node:test'
import { assertAccessible, assertFits, closePage, launch, openPage } from './browser.mjs'
import { startServer } from './server.mjs'

let browser
let server

before(async () => {
  browser = await launch()
  server = await startServer('--max-sessions', '1')
})
after(async () => {
  await browser?.close()
  await server?.stop()
})

const STORY = { prompt: 'Once upon a time in a distant galaxy', max_tokens: 24, threshold: 0.07 }
const link = (settings) => `${server.url}/#${new URLSearchParams({ ...STORY, ...settings })}`
const text = (page) => page.getByRole('group', { name: /^Text, / })
const card = (page) => page.getByRole('dialog', { name: 'What it says here' })

async function idle(page) {
  await page.locator('button.primary:enabled', { hasText: 'Generate' }).waitFor()
}

async function generate(page) {
  await page.getByRole('button', { name: 'Generate', exact: true }).click()
  await page.locator('.fork').first().waitFor()
  await idle(page)
}

test('a fork is opened and its alternative taken, by keyboard alone; the old text is one press away', async () => {
  const page = await openPage(browser, link({}))
  await generate(page)
  const before = await text(page).innerText()
  const fork = page.locator('.fork').first()
  const word = await fork.innerText()
  await fork.focus()
  await page.keyboard.press('Enter')
  await card(page).waitFor()
  await assertAccessible(page, 'an open fork')
  await page.keyboard.press('Escape')
  assert.ok(await fork.evaluate((element) => element === document.activeElement), 'the fork has the focus again')
  await page.keyboard.press('Enter')
  await page.keyboard.press('ArrowDown')
  const other = await card(page).locator('.main .word').nth(1).innerText()
  await page.keyboard.press('Enter')
  await page.getByRole('navigation', { name: 'Texts from here' }).waitFor()
  await idle(page)
  const after = await text(page).innerText()
  const prefix = before.slice(0, before.indexOf(word, STORY.prompt.length))
  assert.ok(after.startsWith(prefix + other), `${after} has ${other} in place of ${word}`)
  const steps = parseInt(await page.getByText(/^\d+ steps$/).innerText(), 10)
  assert.ok(steps >= STORY.max_tokens, `${steps} steps: it goes on as far as the old text went`)
  await assertAccessible(page, 'texts beside each other')
  await page.getByRole('button', { name: 'first text' }).click()
  assert.equal(await text(page).innerText(), before)

  // The one session went on with the new text: taking a word in the old one opens that on the server by itself.
  await page.locator('.fork').nth(1).click()
  await card(page).locator('.main').nth(1).click()
  await page.getByRole('navigation').getByRole('button').nth(2).waitFor()
  await idle(page)
  assert.equal(await page.getByRole('alert').count(), 0)
  await closePage(page)
})

test('what has settled stays as it is while the text grows, and nothing moves', async () => {
  const page = await openPage(browser, link({ max_tokens: 40, threshold: 0.15 }))
  await page.getByRole('button', { name: 'Generate', exact: true }).click()
  await text(page).waitFor()
  await page.evaluate(() => {
    globalThis.seen = []
    globalThis.tops = new Set()
    globalThis.drawn = false
    const look = () => {
      const box = document.querySelector('.text.body')
      const words = box.querySelector('.prose')?.textContent ?? ''
      const tail = box.querySelector('.tail')?.textContent ?? ''
      globalThis.seen.push(words.slice(0, words.length - tail.length))
      globalThis.drawn ||= ['.cursor', '[role=application]'].every((part) => document.querySelector(part))
      if (box.classList.contains('live')) globalThis.tops.add(Math.round(box.getBoundingClientRect().bottom))
    }
    new MutationObserver(look).observe(document.querySelector('.text.body'), { subtree: true, childList: true, characterData: true })
  }) // prettier-ignore
  await idle(page)
  const { seen, tops, drawn } = await page.evaluate(() => ({
    seen: globalThis.seen.map((t) => t.trimEnd()),
    tops: [...globalThis.tops],
    drawn: globalThis.drawn,
  }))
  const settled = seen.filter(Boolean)
  assert.ok(new Set(settled).size > 3, 'it settles as it grows')
  settled.slice(1).forEach((now, i) => assert.ok(now.startsWith(settled[i]), `${settled[i]} became ${now}`))
  assert.ok(drawn, 'the lattice grows with the text')
  assert.equal(tops.length, 1, 'what is below the text has moved')
  await closePage(page)
})

test('a session that was dropped is opened again by itself', async () => {
  const page = await openPage(browser, link({ max_tokens: 8 }), { expected: [/410/] })
  await generate(page)
  const other = await openPage(browser, link({ max_tokens: 2 })) // the server keeps one session
  await generate(other)
  await closePage(other)
  await page.getByRole('button', { name: 'Continue', exact: true }).click()
  await page.getByText('28 steps', { exact: true }).waitFor()
  await idle(page)
  assert.equal(await page.getByRole('alert').count(), 0)
  await closePage(page)
})

test('answers are Markdown, and forks stay in them', async () => {
  const page = await openPage(browser, link({ prompt: 'Tell me a short story about a fox.', chat: true }), {
    viewport: { width: 380, height: 760 },
  }) // prettier-ignore
  await generate(page)
  const view = async (role, name) => {
    await page.getByRole('button', { name: 'View ▾' }).click()
    return page.getByRole(role, { name })
  }
  assert.equal(await (await view('menuitemradio', 'As Markdown')).getAttribute('aria-checked'), 'true')
  await assertAccessible(page, 'the menu of a text')
  await assertFits(page, 'the menu of a text at 380 px')
  await page.keyboard.press('Escape')
  await page.locator('.markdown .fork').first().click()
  await card(page).waitFor()
  await assertFits(page, 'a fork at 380 px')
  await assertAccessible(page, 'Markdown at 380 px')
  await page.keyboard.press('Escape')
  await (await view('menuitemradio', 'As code')).click()
  await (await view('menuitemcheckbox', 'Spaces and line breaks')).click()
  assert.match(await text(page).innerText(), /·/)
  await closePage(page)
})
